"""The stage of a gated linear unit.

Between linears with adapters its backward is one with products of theirs (``glu_contractions.py``): it takes from the
linear that reads h what is left of its backward, and hands on what it computes for those that made gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sloth_kernels import glu_contractions
from sloth_kernels.gradients import Contracted, LowRankSum
from sloth_kernels.linears import Linears
from sloth_kernels.op import Op
from sloth_kernels.ops import glu
from sloth_kernels.stages import Grads, NamedStage, Room, dying, no_room, plus, vjp


class Glu(NamedStage):
    """Gated linear unit: gate, up -> h.

    Args:
        gate, up, h: names of values.
        variant: of ``op``.
        op: the unit's.
        maker: the linears of gate and up, where nothing stands between.
        room: columns to leave free behind h.
    """

    def __init__(
        self, gate: str, up: str, h: str, variant: str, op: Op, maker: Linears | None = None, room: Room = no_room
    ) -> None:
        super().__init__((gate, up), (h,), (gate, up) if maker is None else (gate, up, maker.inner))
        self.variant, self.op, self.maker, self.room = variant, op, maker, room
        self.overwrites = (gate, up)

    def workspace(self, tokens: int, widths: Mapping[str, float], autocast: torch.dtype | None) -> int:
        """The sums of products in its backward, where the linear that reads h is taken to have the rank of another."""
        counts = [count for _, count in self._wanted()]
        return glu_contractions.sums_bytes(int(widths[self.reads[0]] / 2), sum(counts) + max(counts, default=0))

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[Any, ...]:
        """h."""
        if self._runs(gate, up):
            return (glu.forward(gate, up, self.variant, self.room()),)
        return (self.op.fn(gate, up, self.variant),)

    def fills(self, values: Mapping[str, Any], u_TR: torch.Tensor) -> bool:
        """See ``SumTaker``. Where something has to be computed again before, others may look at dA meanwhile."""
        return all(name in values for name in self.needs) and self._contracts(values, u_TR)

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        """dgate and dup."""
        dh, (gate, up) = dys[0], (values[name] for name in self.reads)
        last = set(self.reads).issubset(dying(values))
        if isinstance(dh, LowRankSum):
            ts = self._ts(values) if dxs[0] is None and dxs[1] is None else [None, None]
            has_work = dh.dA_RK is not None or any(t_TR is not None for t_TR in ts)
            if has_work and self._contracts(values, dh.u_TR):
                return self._contracted(dh, gate, up, ts, last, dxs), ()
        return [plus(dx, grad) for dx, grad in zip(dxs, self._grads(dh, gate, up, last), strict=True)], ()

    def _runs(self, gate: torch.Tensor, up: torch.Tensor) -> bool:
        return self.op.fn is glu.glu and glu.kernel_takes(gate, up)

    def _contracts(self, values: Mapping[str, Any], u_TR: torch.Tensor) -> bool:
        """Whether the kernel with products runs for the gradient ``dy + u A``."""
        gate, up = (values[name] for name in self.reads)
        return glu_contractions.takes(u_TR) and u_TR.dtype == gate.dtype and self._runs(gate, up)

    def _grads(self, dh: Any, gate: torch.Tensor, up: torch.Tensor, last: bool) -> Sequence[torch.Tensor | None]:
        runs = self._runs(gate, up)
        if isinstance(dh, LowRankSum):
            if runs and dh.u_TR.shape[1] <= glu.MAX_RANK:
                return glu.low_rank_backward(dh.dy_TK, dh.u_TR, dh.A_RK, gate, up, self.variant, last)
            dh = dh.sum().view(gate.shape)
        if runs:
            return glu.backward(dh, gate, up, self.variant, last)
        return vjp(lambda g, u: self.op.fn(g, u, self.variant), (gate, up), (dh,), (True, True))

    def _contracted(
        self,
        dh: LowRankSum,
        gate: torch.Tensor,
        up: torch.Tensor,
        ts: Sequence[torch.Tensor | None],
        last: bool,
        dxs: Sequence[Any],
    ) -> list[Any]:
        """dgate and dup, with their products where there is a t for them; fills dA, where that is left to it."""
        made = glu_contractions.backward(dh, gate, up, self.variant, ts[0], ts[1], dh.dA_RK is not None, last)
        if dh.dA_RK is not None and made.h_IR is not None:
            dh.dA_RK.copy_(made.h_IR.t())
        grads = [(made.dgate, made.gate_IR), (made.dup, made.up_IR)]
        return [
            plus(dx, grad) if product_IR is None else Contracted(grad, product_IR, first)
            for dx, (grad, product_IR), (first, _) in zip(dxs, grads, self._wanted(), strict=True)
        ]

    def _wanted(self) -> Sequence[tuple[int, int]]:
        return ((0, 0), (0, 0)) if self.maker is None else self.maker.contractions()

    def _ts(self, values: Mapping[str, Any]) -> list[torch.Tensor | None]:
        """The columns of t for dgate and for dup, where there are any that the kernel takes."""
        inner = [] if self.maker is None else values[self.maker.inner]
        if len(inner) != 1 or inner[0].dtype != values[self.reads[0]].dtype or inner[0].stride(1) != 1:
            return [None, None]
        (t_TR,) = inner
        return [
            t_TR.narrow(1, first, count)
            if 0 < count <= glu_contractions.MAX_RANK and first + count <= t_TR.shape[1]
            else None
            for first, count in self._wanted()
        ]
