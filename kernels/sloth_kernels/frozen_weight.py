"""The weight of a linear, in whatever form it is kept: what the ops over linears take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from sloth_kernels.ops import nf4
from sloth_kernels.products import in_dtype


class Weight(Protocol):
    """An (N, K) matrix; implement these five to add a way of keeping one."""

    rounds_each: ClassVar[bool]
    """Whether PEFT rounds each adapter's term to y's dtype before it adds it; otherwise it rounds the sum."""

    @property
    def trained(self) -> torch.Tensor | None:
        """The tensor (N, K) that a gradient is wanted for; None for a frozen weight."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """N and K."""
        ...

    def dtypes(self, x: torch.dtype, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """What the stock linear computes in and what it returns, for x's dtype and autocast's (None where it is off).

        Raises ``RuntimeError`` where the stock linear itself does.
        """
        ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in ``dtype``, of any strides, for one product: made on demand, or the one that is kept."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class DenseWeight:
    """The weight of an ``nn.Linear``, or a transposed view of a ``Conv1D``'s; trained if it requires a gradient."""

    rounds_each: ClassVar[bool] = False
    weight: torch.Tensor

    @property
    def trained(self) -> torch.Tensor | None:
        """The weight itself, unless it is frozen."""
        return self.weight if self.weight.requires_grad else None

    @property
    def shape(self) -> Sequence[int]:
        """N and K."""
        return self.weight.shape

    def dtypes(self, x: torch.dtype, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """Autocast's dtype, or x's, which the weight must then share."""
        if autocast is not None and x != torch.float64:
            return autocast, autocast
        if self.weight.dtype != x:
            raise RuntimeError(f"x is {x} and the weight {self.weight.dtype}: cast one of them or use torch.autocast")
        return x, x

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight itself, or a cast of it under autocast."""
        return in_dtype(self.weight, dtype)


@dataclass(frozen=True, eq=False, slots=True)
class Weight4bit:
    """The weight of bitsandbytes' ``Linear4bit``, dequantised at each use. Raises ``ValueError`` for a misfit."""

    rounds_each: ClassVar[bool] = True
    quantized: nf4.Quantized4bit
    compute_dtype: torch.dtype | None = None
    """The layer's; None for x's."""

    @property
    def trained(self) -> None:
        """Quantised weights never train."""

    def __post_init__(self) -> None:
        nf4.check(self.quantized)
        if len(self.quantized.shape) != 2:
            raise ValueError(f"a linear's weight has two dimensions, this one shape {tuple(self.quantized.shape)}")

    @property
    def shape(self) -> Sequence[int]:
        """N and K."""
        return self.quantized.shape

    def dtypes(self, x: torch.dtype, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        """The layer's compute dtype, whatever autocast's, and x's."""
        return self.compute_dtype or x, x

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.quantized.packed.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """A new matrix, rounded once from float32."""
        return self.write(torch.empty(tuple(self.shape), dtype=dtype, device=self.device))

    def write(self, out: torch.Tensor) -> torch.Tensor:
        """The matrix, rounded once to the dtype of ``out`` (N, K), whose rows are contiguous and may lie apart."""
        return nf4.forward(self.quantized, out)
