"""A stage that is a program of its own, run for some rows at a time.

What works on each token alone (norms, linears, activations) may run tile by tile: the values between are never all
there at once, in forward or in backward, which makes each tile's again (ALST, arXiv:2506.13996, section 3.1.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sloth_kernels.linears import BoundLinears
from sloth_kernels.program import Bound, Frame, Program
from sloth_kernels.stages import Grads, NamedStage, plus
from sloth_kernels.values import Here


class Tiled(NamedStage):
    """x -> y by ``program``, for at most ``rows`` tokens at a time. Nothing but x is needed for its backward.

    Where adapters draw dropout masks there is one tile: masks for parts of x would be others than those for x.
    """

    def __init__(self, x: str, y: str, program: Program, rows: int) -> None:
        super().__init__((x,), (y,), (x,))
        self.program, self.rows = program, rows

    def bind(self, autocast: torch.dtype | None) -> _BoundTiled:
        """With what the stages inside are now."""
        return _BoundTiled(self, autocast)


class _BoundTiled:
    recordable = False

    def __init__(self, stage: Tiled, autocast: torch.dtype | None) -> None:
        self.stage, self.autocast = stage, autocast
        self.tiles: list[Sequence[Bound]] = [self._bind()]
        self.operands = [operand for bound in self.tiles[0] for operand in bound.operands]
        draws = any(bound.drops() for bound in self.tiles[0] if isinstance(bound, BoundLinears))
        self.rows = None if draws else stage.rows

    def _bind(self) -> Sequence[Bound]:
        return [stage.bind(self.autocast) for stage in self.stage.program.stages]

    def _split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The tiles of ``x`` (B, S, H), each (rows, H), with bound stages of their own."""
        x_TH = x.reshape(-1, x.shape[-1])
        parts = x_TH.split(self.rows or max(1, len(x_TH)))
        self.tiles += [self._bind() for _ in parts[len(self.tiles) :]]
        return parts

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        parts = [
            Frame(self.stage.program, bound, {}).run_forward(part, frozenset())
            for part, bound in zip(self._split(x), self.tiles, strict=False)
        ]
        return (torch.cat(parts).view(*x.shape[:-1], -1),)

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        x = values[self.stage.reads[0]]
        dx = torch.empty_like(x.reshape(-1, x.shape[-1])) if wants[0] else None
        sums: list[torch.Tensor | None] = [None] * len(self.operands)
        start = 0
        for part, dy, bound in zip(self._split(x), self._split(dys[0]), self.tiles, strict=False):
            dx_part, grads = Frame(self.stage.program, bound, {}).run_backward(_here(part), dy, wants)
            if dx is not None and dx_part is not None:
                dx[start : start + len(part)] = dx_part
            start += len(part)
            sums = [_added(total, grad) for total, grad in zip(sums, grads, strict=True)]
        typed = [
            None if total is None or operand is None else total.to(operand.dtype)
            for total, operand in zip(sums, self.operands, strict=True)
        ]
        return (plus(dxs[0], None if dx is None else dx.view(x.shape)),), typed


def _here(part: torch.Tensor) -> Here:
    return Here(lambda: part)


def _added(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum, in float32 where they have fewer bits."""
    if grad is None:
        return total
    return grad.to(torch.promote_types(grad.dtype, torch.float32)) if total is None else total.add_(grad)
