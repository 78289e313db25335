"""The stage of linears that share an input, with their adapters.

Where the dense weights are kept (``dense_cache.py``) and everything is of one dtype, a weight and its adapters are one
product each way; in all other cases ``ops/lora.py`` computes the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sloth_kernels.adapters import LoraLinear, Operands, Plan, flattened, operands_of, plan_of
from sloth_kernels.dense_cache import DenseGroup
from sloth_kernels.frozen_weight import Weight4bit
from sloth_kernels.ops import lora
from sloth_kernels.products import in_dtype, product, rows, split, stacked
from sloth_kernels.stages import Grads, LowRankSum, NamedStage, plus

DENSE_TRAFFIC = 1.27
"""Bytes moved for each byte of a dense 16-bit weight made of 4 bits: a quarter is read, with its scales."""


class Linears(NamedStage):
    """x -> one value for each linear, and the adapters' inner products.

    Args:
        x, ys: names of values.
        read: the linears as they are now.
        group: where their dense weights may be kept.
        residual: a value that is added to the result; for a single linear.
    """

    def __init__(
        self,
        x: str,
        ys: Sequence[str],
        read: Callable[[], Sequence[LoraLinear]],
        group: DenseGroup | None = None,
        residual: str | None = None,
    ) -> None:
        inner = f"{ys[0]}.t"
        super().__init__((x,) if residual is None else (x, residual), (*ys, inner), (x, inner))
        self.read, self.group = read, group or DenseGroup()
        self.leaves_sum = False
        """Whether the stage that made x takes a ``LowRankSum`` for the gradient of it."""

    def room(self) -> int:
        """The columns that it would have behind x."""
        return self.group.columns(self.read()) if self.group.keeps else 0

    def flops(self, tokens: int, length: int, widths: Mapping[str, float]) -> float:
        """Of the weights; the adapters' are few."""
        return sum(2.0 * tokens * math.prod(linear.weight.shape) for linear in self.read())

    def workspace(self, tokens: int) -> int:
        """The largest dense weight that is made for its product."""
        return max((2 * math.prod(linear.weight.shape) for linear in self._in_4bit()), default=0)

    def traffic(self) -> float:
        """Bytes that move when its 4-bit weights are made dense."""
        return DENSE_TRAFFIC * sum(2 * math.prod(linear.weight.shape) for linear in self._in_4bit())

    def dense_bytes(self) -> int:
        """Bytes of the dense copies that its group would keep, in 16 bits, with the adapters' columns."""
        linears = self._in_4bit()
        columns = self.group.columns(linears)
        return sum(2 * linear.weight.shape[0] * (linear.weight.shape[1] + columns) for linear in linears)

    def _in_4bit(self) -> list[LoraLinear]:
        return [linear for linear in self.read() if isinstance(linear.weight, Weight4bit)]

    def bind(self, autocast: torch.dtype | None) -> BoundLinears:
        """With the adapters that are active."""
        return BoundLinears(self, self.read(), autocast)


class BoundLinears:
    """The stage with the adapters that are active."""

    def __init__(self, stage: Linears, linears: Sequence[LoraLinear], autocast: torch.dtype | None) -> None:
        self.stage, self.linears, self.autocast = stage, linears, autocast
        self.by_kind = operands_of(linears)
        self.operands = flattened(self.by_kind)
        self.plan: Any = None
        self.draws: Any = None
        self.residual_dtype = torch.float32

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[Any, ...]:
        self.plan = plan = plan_of(self.linears, x.shape, x.dtype, self.autocast)
        if residual is not None:
            self.residual_dtype = residual.dtype
        if self._joins(plan, x.dtype):
            return self._forward_joined(x, self.stage.group.weights(self.linears, x.dtype), residual)
        ys, banks_t, self.draws = lora.forward(x, plan, self.by_kind, self.draws)
        return (*ys, banks_t) if residual is None else (residual + ys[0], banks_t)

    def drops(self) -> bool:
        """Whether an adapter draws dropout masks."""
        return any(adapter.dropout for linear in self.linears for adapter in linear.adapters)

    def _joins(self, plan: Plan, dtype: torch.dtype) -> bool:
        """Whether each weight may be kept dense and be one product with its adapters."""
        if not self.stage.group.keeps or plan.drops or len(plan.banks) > 1:
            return False
        dtypes = {bank.dtype for bank in plan.banks} | set(plan.sum_dtypes) | {d for pair in plan.dtypes for d in pair}
        return dtypes == {dtype} and all(isinstance(linear.weight, Weight4bit) for linear in self.linears)

    def _forward_joined(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[Any, ...]:
        x_TK, t_TR = rows(x), _inner(x, self.by_kind.As)
        joined_x = _beside(x_TK, t_TR, weights[0].shape[1])
        # A product adds one matrix for free: a residual of its dtype, where no bias takes the place.
        taken = residual is not None and self.by_kind.biases[0] is None and residual.dtype == x.dtype
        addend = rows(residual) if residual is not None and taken else None
        ys = []
        for weight, bias_N in zip(weights, self.by_kind.biases, strict=True):
            first = bias_N if addend is None else addend
            if joined_x is None:
                y = _apart(x_TK, t_TR, weight, bias_N, addend)
            else:
                y = torch.mm(joined_x, weight.t()) if first is None else torch.addmm(first, joined_x, weight.t())
            ys.append(y.view(*x.shape[:-1], len(weight)))
        return (*ys, [t_TR]) if residual is None or taken else (residual + ys[0], [t_TR])

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        x, banks_t = (values[name] for name in self.stage.needs)
        plan, reads = self.plan, len(self.stage.reads)
        needs = Operands.of(plan, list(wants[reads:]))
        pairs = zip(dys, plan.dtypes, strict=False)
        own = [None if dy is None else in_dtype(dy, y_dtype) for dy, (_, y_dtype) in pairs]
        there = [dy for dy in own if dy is not None]
        weights = self.stage.group.made()
        if weights and wants[0] and len(there) == len(own) and self._joins(plan, x.dtype):
            dx, grads = self._backward_joined(x, banks_t[0], there, plan, needs, weights)
            if not (self.stage.leaves_sum and dxs[0] is None and dx.u_TR.shape[1]):
                dx = dx.dy_TK.addmm_(dx.u_TR, dx.A_RK) if dx.u_TR.shape[1] else dx.dy_TK
        else:
            saved = lora.Saved(plan, self.by_kind, x if lora.saves_x(needs) else None, banks_t, self.draws)
            dx, grads = lora.backward(own, saved, needs, x.dtype if wants[0] else None)
        flat = [*grads.weights, *grads.biases, *grads.As, *grads.Bs]
        if not isinstance(dx, LowRankSum):
            dx = plus(dxs[0], None if dx is None else dx.unflatten(0, x.shape[:-1]))
        return (dx,) if reads == 1 else (dx, plus(dxs[1], in_dtype(there[0], self.residual_dtype))), flat

    def _backward_joined(
        self,
        x: torch.Tensor,
        t_TR: torch.Tensor,
        dys: Sequence[torch.Tensor],
        plan: Plan,
        needs: Operands[bool],
        weights: Sequence[torch.Tensor],
    ) -> tuple[LowRankSum, Operands[Any]]:
        operands, width = self.by_kind, x.shape[-1]
        n, m = len(dys), len(plan.scales)
        grads = Operands[Any]([None] * n, [None] * n, [None] * m, [None] * m)
        dys = [rows(dy) for dy in dys]
        joined = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            joined.addmm_(dy, weight)
        dx_TK, u_TR = joined[:, :width], joined[:, width : width + t_TR.shape[1]]
        for i, dy in enumerate(dys):
            if needs.biases[i]:
                grads.biases[i] = dy.sum(0, dtype=operands.biases[i].dtype)
        if not m:
            return LowRankSum(dx_TK, u_TR, dx_TK[:0]), grads
        ranks = plan.banks[0].ranks
        for j, own_t_TR in enumerate(split(t_TR, ranks)):
            if needs.Bs[j]:
                grads.Bs[j] = product(dys[plan.owners[j]].t(), own_t_TR, operands.Bs[j].dtype, plan.scales[j])
        if any(needs.As):
            grads.As[:] = split(product(u_TR.t(), rows(x), operands.As[0].dtype), ranks, 0)
        return LowRankSum(dx_TK, u_TR, stacked(operands.As, x.dtype)), grads


def _inner(x: torch.Tensor, As: Sequence[torch.Tensor]) -> torch.Tensor:
    """t (T, R), of all adapters side by side."""
    x_TK = rows(x)
    return torch.mm(x_TK, stacked(As, x.dtype).t()) if As else x_TK.new_empty(len(x_TK), 0)


def _beside(x_TK: torch.Tensor, t_TR: torch.Tensor, width: int) -> torch.Tensor | None:
    """[x | t | 0] (T, width), in the columns that were left free behind x; None where there are none."""
    n_in, rank = x_TK.shape[1], t_TR.shape[1]
    if x_TK.stride() != (width, 1) or n_in == width:
        return None
    joined = x_TK.as_strided((len(x_TK), width), (width, 1))
    joined[:, n_in : n_in + rank].copy_(t_TR)
    if n_in + rank < width:
        joined[:, n_in + rank :].zero_()
    return joined


def _apart(
    x_TK: torch.Tensor,
    t_TR: torch.Tensor,
    weight: torch.Tensor,
    bias_N: torch.Tensor | None,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """The same in two products. The short one goes first, for the long one to add to; with a bias the long one is
    first, as its size must not cost the term its last bits."""
    n_in, rank = x_TK.shape[1], t_TR.shape[1]
    W_KN, B_RN = weight[:, :n_in].t(), weight[:, n_in : n_in + rank].t()
    if bias_N is not None:
        y = torch.addmm(bias_N, x_TK, W_KN)
        return y.addmm_(t_TR, B_RN) if rank else y
    if not rank:
        return torch.mm(x_TK, W_KN) if addend is None else torch.addmm(addend, x_TK, W_KN)
    y = torch.mm(t_TR, B_RN) if addend is None else torch.addmm(addend, t_TR, B_RN)
    return y.addmm_(x_TK, W_KN)
