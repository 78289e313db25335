"""Rows of an embedding matrix, however they are stored: plain, in 8 or 4 bits by bitsandbytes, sharded over ranks.

Each class reads and writes whole rows of a matrix (V, H) in place. Where rows are quantised, what is written is rounded
as the rest of the matrix is. Sharded matrices are those of one mesh dimension; their methods are collective, so every
rank must call them alike, which it does: what they return to decide by is the same on all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK_ELEMENTS = 1 << 23
"""Entries handled at a time: bounds the float64 copy that a reduction may make to 64 MiB."""


class Plain:
    """A tensor (V, H) of floating point numbers."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    @property
    def data(self) -> torch.Tensor:
        """The rows that are here."""
        return self.weight.data

    def __len__(self) -> int:
        return len(self.weight)

    def largest(self) -> torch.Tensor:
        """The magnitude of each row's largest entry (V,), float32: a threshold may not be representable in float16."""
        return _largest(self.data)

    def total(self) -> torch.Tensor:
        """The sum of all rows (H,), float64 (float32 on Apple's GPUs, which have no float64)."""
        return column_sum(self.data)

    def finite(self, mean: torch.Tensor) -> bool:
        """Whether ``mean`` can be written."""
        return bool(mean.to(self.data.dtype).isfinite().all())

    def read(self, rows: torch.Tensor) -> Any:
        """What is stored for ``rows``, for ``restore``."""
        return self.data[rows]

    def write(self, rows: torch.Tensor, mean: torch.Tensor | float) -> None:
        """Set each of ``rows`` to ``mean`` (H,), rounded once."""
        self.data[rows] = mean.to(self.data.dtype) if isinstance(mean, torch.Tensor) else mean

    def restore(self, rows: torch.Tensor, before: Any, after: Any) -> None:
        """Bring back what ``read`` gave before, except where it is no longer what it gave after: training's work."""
        data = self.data
        if type(data) is not torch.Tensor or data.dim() != 2 or len(data) <= int(rows.max()):
            return
        places = rows.to(data.device)
        still = (data[places] == after.to(data)).all(dim=1)
        data[places[still]] = before.to(data)[still]


class EightBit(Plain):
    """bitsandbytes' int8 rows (V, H), each with the magnitude of its largest entry in ``SCB`` (V,)."""

    def largest(self) -> torch.Tensor:
        return self.weight.SCB.float()  # pyright: ignore[reportAttributeAccessIssue]

    def total(self) -> torch.Tensor:
        scales: torch.Tensor = self.weight.SCB.double() / 127  # pyright: ignore[reportAttributeAccessIssue]
        parts = zip(_chunks(self.data), scales.split(_rows_of_a_chunk(self.data)), strict=True)
        return torch.stack([(part.double() * scale[:, None]).sum(0) for part, scale in parts]).sum(0)

    def finite(self, mean: torch.Tensor) -> bool:
        return bool(mean.isfinite().all())

    def read(self, rows: torch.Tensor) -> Any:
        return self.data[rows], self.weight.SCB[rows]  # pyright: ignore[reportAttributeAccessIssue]

    def write(self, rows: torch.Tensor, mean: torch.Tensor | float) -> None:
        if not isinstance(mean, torch.Tensor):
            self.data[rows] = 0
            return
        scale = mean.abs().max()
        self.data[rows] = (mean * (127 / scale)).round().to(torch.int8)
        self.weight.SCB[rows] = scale.to(self.weight.SCB.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def restore(self, rows: torch.Tensor, before: Any, after: Any) -> None:
        self.data[rows], self.weight.SCB[rows] = before  # pyright: ignore[reportAttributeAccessIssue]


class FourBit(Plain):
    """bitsandbytes' 4-bit entries, two to a byte, in blocks that each have a magnitude; rows are whole blocks."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self.state: Any = weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        self.count, self.width = self.state.shape
        self.bytes = weight.data.view(-1).view(self.count, -1)
        self.scales = self.state.absmax.view(self.count, -1)

    def __len__(self) -> int:
        return self.count

    def largest(self) -> torch.Tensor:
        return torch.cat([_largest(part) for part in self._parts()])

    def total(self) -> torch.Tensor:
        return torch.stack([part.sum(0, dtype=torch.float64) for part in self._parts()]).sum(0)

    def _parts(self) -> Any:
        step = max(1, CHUNK_ELEMENTS // self.width)
        for start in range(0, self.count, step):
            yield self._values(slice(start, start + step))

    def _values(self, rows: Any) -> torch.Tensor:
        """Rows in float32."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        packed, scales, old = self.bytes[rows], self.scales[rows], self.state
        shape = torch.Size((len(packed), self.width))
        state = QuantState(
            scales.reshape(-1), shape, old.code, old.blocksize, old.quant_type, torch.float32
        )  # fmt: skip
        return dequantize_4bit(packed.reshape(-1, 1), state)

    def finite(self, mean: torch.Tensor) -> bool:
        return bool(mean.isfinite().all())

    def read(self, rows: torch.Tensor) -> Any:
        return self.bytes[rows], self.scales[rows]

    def write(self, rows: torch.Tensor, mean: torch.Tensor | float) -> None:
        from bitsandbytes.functional import quantize_4bit

        if not isinstance(mean, torch.Tensor):
            self.scales[rows] = 0
            return
        packed, state = quantize_4bit(
            mean.float()[None], blocksize=self.state.blocksize, quant_type=self.state.quant_type
        )
        self.bytes[rows], self.scales[rows] = packed.view(-1), state.absmax.to(self.scales.dtype)

    def restore(self, rows: torch.Tensor, before: Any, after: Any) -> None:
        self.bytes[rows], self.scales[rows] = before


class Sharded(Plain):
    """A DTensor (V, H) on a mesh of one dimension, sharded by rows or by columns, or whole on each rank."""

    def __init__(self, weight: nn.Parameter) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        super().__init__(weight)
        shard: Any = weight.data
        self.group, self.by_rows = shard.device_mesh.get_group(), shard.placements[0].is_shard(0)
        _, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
        self.start = offset[0]

    @property
    def data(self) -> torch.Tensor:
        return self.weight.data.to_local()  # pyright: ignore[reportAttributeAccessIssue]

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        import torch.distributed as dist

        dist.all_reduce(values, getattr(dist.ReduceOp, how), self.group)
        return values

    def largest(self) -> torch.Tensor:
        local = _largest(self.data) if self.data.numel() else self.data.new_zeros(len(self.data), dtype=torch.float32)
        whole = local.new_zeros(len(self))
        whole[self.start : self.start + len(local)] = local
        return self._reduced(whole, "MAX")

    def total(self) -> torch.Tensor:
        local = column_sum(self.data)
        return self._reduced(local, "SUM") if self.by_rows else local

    def finite(self, mean: torch.Tensor) -> bool:
        well = mean.to(self.data.dtype).isfinite().all().float()
        return bool(self._reduced(well, "MIN"))

    def _here(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows - self.start
        return rows[(rows >= 0) & (rows < len(self.data))]

    def read(self, rows: torch.Tensor) -> Any:
        return super().read(self._here(rows))

    def write(self, rows: torch.Tensor, mean: torch.Tensor | float) -> None:
        super().write(self._here(rows), mean)

    def restore(self, rows: torch.Tensor, before: Any, after: Any) -> None:
        data, places = self.data, self._here(rows)
        still = (data[places] == after).all(dim=1)
        data[places[still]] = before[still]


def store_of(weight: nn.Parameter) -> Plain | str:
    """How the rows of ``weight`` are read and written; a clause that says why not, where they cannot be."""
    data, kind = weight.data, type(weight).__name__
    if data.is_meta:
        return "its values are not loaded yet (meta device)"
    if kind == "Params4bit":
        return _four_bit(weight)
    if kind == "Int8Params" and getattr(weight, "SCB", None) is not None and data.dtype == torch.int8:
        return EightBit(weight)
    if type(data).__name__ == "DTensor" and data.dim() == 2:
        placements: Any = data.placements  # pyright: ignore[reportAttributeAccessIssue]
        plain = (
            len(placements) == 1 and not placements[0].is_partial() and "Strided" not in type(placements[0]).__name__
        )
        return Sharded(weight) if plain else f"it is sharded in a way that is not known here ({placements})"
    if not data.is_floating_point() or data.element_size() < 2:
        return f"it is quantised ({str(data.dtype).removeprefix('torch.')})"
    if type(data) is not torch.Tensor:
        return f"it is a {type(data).__name__}, whose rows are spread over ranks or packed; fix them before sharding"
    if data.dim() != 2 or data.numel() == 0:
        return f"it is sharded or flattened (shape {tuple(data.shape)} here); fix it before sharding"
    return Plain(weight)


def _four_bit(weight: Any) -> Plain | str:
    state = weight.quant_state
    if state is None:
        return "it is not quantised yet: its rows are packed when it moves to its device"
    if state.nested:
        return "it is quantised (4 bits) with double quantisation, which rounds away what marks an untrained row"
    if len(state.shape) != 2 or state.shape[1] % state.blocksize:
        return f"it is quantised (4 bits), in blocks of {state.blocksize} that are no whole part of a row"
    return FourBit(weight)


def column_sum(weight: torch.Tensor) -> torch.Tensor:
    """The sum (H) of the rows of ``weight`` (V, H), float64 (float32 on Apple's GPUs, which have no float64)."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    total = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for chunk in _chunks(weight):
        total += chunk.sum(dim=0, dtype=dtype)
    return total


def _largest(weight: torch.Tensor) -> torch.Tensor:
    found = []
    for chunk in _chunks(weight):
        low, high = torch.aminmax(chunk, dim=1)
        found.append(torch.maximum(-low, high))
    return torch.cat(found).float()


def _rows_of_a_chunk(weight: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[1])


def _chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(_rows_of_a_chunk(weight))
