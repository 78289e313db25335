"""The stage of linears that share an input, with their adapters.

Where the weights have 4 bits and everything is computed in one dtype, a weight and its adapters are one product each
way (``joined.py``), of a dense matrix that is kept (``dense_cache.py``) or made for the product; in all other cases
``lora_passes.py`` computes the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sloth_kernels import joined, lora_passes
from sloth_kernels.adapters import LoraLinear, Operands, Plan, Siblings
from sloth_kernels.dense_cache import DenseGroup
from sloth_kernels.frozen_weight import Weight4bit
from sloth_kernels.gradients import Contracted, LowRankSum, SumTaker, plain
from sloth_kernels.products import in_dtype, product, rows, split
from sloth_kernels.stages import Grads, NamedStage, plus

DENSE_TRAFFIC = 1.27
"""Bytes moved for each byte of a dense 16-bit weight made of 4 bits: a quarter is read, with its scales."""


class _Form(NamedTuple):
    """What a linear costs depends on this; its tensors may be on other devices, or in shards, when that is asked."""

    shape: tuple[int, int]
    """N and K."""
    in_4bit: bool
    rank: int
    """Of all of its adapters."""
    adapter_itemsize: int
    """Bytes of an element of the widest of them; 0 without any."""

    @classmethod
    def of(cls, linear: LoraLinear) -> _Form:
        ranks = [adapter.A_RK.shape[0] for adapter in linear.adapters]
        itemsize = max((adapter.A_RK.dtype.itemsize for adapter in linear.adapters), default=0)
        n_out, n_in = linear.weight.shape
        return cls((n_out, n_in), isinstance(linear.weight, Weight4bit), sum(ranks), itemsize)


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
        self.inner = f"{ys[0]}.t"
        super().__init__((x,) if residual is None else (x, residual), (*ys, self.inner), (x, self.inner))
        self.read, self.group = read, group or DenseGroup()
        self._siblings: Siblings | None = None
        self._forms: list[_Form] | None = None
        self._columns = 0
        self.taker: SumTaker | None = None
        """The stage that made x, where it takes a ``LowRankSum`` for the gradient of it."""
        self.dense_gradient = False
        """Whether the stage that made x would copy a gradient of it whose rows are apart."""
        self.copies_x = True
        """Whether the stage that made x leaves no columns free behind it."""

    def forget(self) -> None:
        """Keep no tensor of its linears until it is bound again; what they cost is still known."""
        self.forms()
        self._siblings = None

    def room(self) -> int:
        """The columns that it would have behind x, as it was bound last."""
        return self._columns

    def gradient_room(self) -> int:
        """The columns that it would have behind the gradients of all its results but the last, for that one."""
        return self.forms()[-1].shape[0] if self._columns and self.group.keeps else 0

    def contractions(self) -> Sequence[tuple[int, int]]:
        """Of which columns of t, (first, count), each dy's product is of use, as it was bound last; 0 where of none."""
        if self._siblings is None or not self._siblings.joins:
            return [(0, 0)] * (len(self.writes) - 1)
        first, wanted = 0, []
        for _, _, adapters in self._siblings.linears:
            count = sum(len(adapter.A_RK) for adapter in adapters)
            wanted.append((first, count if any(adapter.B_NR.requires_grad for adapter in adapters) else 0))
            first += count
        return wanted

    def forms(self) -> list[_Form]:
        """Of its linears, as they were bound last."""
        if self._forms is None:
            self._forms = [_Form.of(linear) for linear in self.read()]
        return self._forms

    def flops(self, tokens: int, length: int, widths: Mapping[str, float]) -> float:
        """Of the weights; the adapters' are few."""
        return sum(2.0 * tokens * math.prod(form.shape) for form in self.forms())

    def workspace(self, tokens: int, widths: Mapping[str, float], autocast: torch.dtype | None) -> int:
        """The largest dense weight that is made for its product, with x copied beside the adapters' columns where it
        has no room for them, and what wide adapters have x, dx and dy cast to."""
        rank = sum(form.rank for form in self.forms())
        dense = max((self._joined_bytes(form.shape[0], form.shape[1], rank) for form in self._in_4bit()), default=0)
        if dense and self.copies_x:
            dense += self._joined_bytes(tokens, self.forms()[0].shape[1], rank)
        return dense + int(tokens * max((self._wide_bytes(form, widths, autocast) for form in self.forms()), default=0))

    @staticmethod
    def _joined_bytes(rows_: int, n_in: int, rank: int) -> int:
        return 2 * rows_ * (n_in + joined.columns_for(rank))

    def _wide_bytes(self, form: _Form, widths: Mapping[str, float], autocast: torch.dtype | None) -> float:
        """Bytes a token of copies in the dtype of its adapters, where that is wider than x's."""
        (n_out, n_in), own = form.shape, form.adapter_itemsize
        computed = own if autocast is None else min(own, autocast.itemsize)
        return computed * (2 * n_in + n_out) if computed * n_in > widths[self.reads[0]] else 0.0

    def traffic(self) -> float:
        """Bytes that move when its 4-bit weights are made dense."""
        return DENSE_TRAFFIC * sum(2 * math.prod(form.shape) for form in self._in_4bit())

    def dense_bytes(self) -> int:
        """Bytes of the dense copies that its group would keep, in 16 bits, with the adapters' columns."""
        forms = self._in_4bit()
        rank = sum(form.rank for form in forms)
        return sum(self._joined_bytes(*form.shape, rank) for form in forms)

    def _in_4bit(self) -> list[_Form]:
        return [form for form in self.forms() if form.in_4bit]

    def bind(self, autocast: torch.dtype | None) -> BoundLinears:
        """With the adapters that are active."""
        linears, siblings = self.read(), self._siblings
        if siblings is None or not siblings.are(linears, autocast):
            siblings = self._siblings = Siblings(linears, autocast)
            self._columns = joined.columns_of(linears) if siblings.joins else 0
            self._forms = None
            self.forms()
        return BoundLinears(self, siblings)


class BoundLinears:
    """The stage with the adapters that are active."""

    def __init__(self, stage: Linears, siblings: Siblings) -> None:
        self.stage, self.siblings = stage, siblings
        self.operands = siblings.flat
        self.draws: Any = None
        self.residual_dtype = torch.float32

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[Any, ...]:
        siblings = self.siblings
        plan = siblings.plan(x)
        if residual is not None:
            self.residual_dtype = residual.dtype
        if self._joins(plan, x):
            return self._forward_joined(x, self.stage.group.joined(siblings, x.dtype), residual)
        ys, banks_t, self.draws = lora_passes.forward(x, plan, siblings.operands, self.draws)
        return (*ys, banks_t) if residual is None else (residual + ys[0], banks_t)

    def _joins(self, plan: Plan, x: torch.Tensor) -> bool:
        return plan.dtype == x.dtype and self.siblings.joins

    @property
    def recordable(self) -> bool:
        """Masks are drawn anew in each pass."""
        return not self.drops()

    def marks(self) -> list[Any]:
        """What its products read."""
        group, siblings = self.stage.group, self.siblings
        return [siblings, group.keeps, group.kept(siblings)]

    def drops(self) -> bool:
        """Whether an adapter draws dropout masks."""
        return self.siblings.drops

    def _forward_joined(self, x: torch.Tensor, made: joined.Joined, residual: torch.Tensor | None) -> tuple[Any, ...]:
        biases, lead, x_TK = self.siblings.operands.biases, x.shape[:-1], rows(x)
        t_TR = x_TK.new_empty(len(x_TK), 0) if made.A_RK is None else torch.mm(x_TK, made.A_RK.t())
        joined_x = joined.beside(x_TK, t_TR, made.width)
        # A product adds one matrix for free: a residual of its dtype, where no bias takes the place.
        taken = residual is not None and biases[0] is None and residual.dtype == x.dtype
        addend = rows(residual) if residual is not None and taken else None
        ys = []
        for i, bias_N in enumerate(biases):
            y_TN = joined.forward_one(joined_x, made, i, bias_N, addend)
            ys.append(y_TN.view(*lead, y_TN.shape[1]))
        return (*ys, [t_TR]) if residual is None or taken else (residual + ys[0], [t_TR])

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        x, banks_t = (values[name] for name in self.stage.needs)
        siblings, reads = self.siblings, len(self.stage.reads)
        plan = siblings.plan(x)
        pairs = zip(dys, plan.dtypes, strict=False)
        own = [None if dy is None else in_dtype(plain(dy), y_dtype) for dy, (_, y_dtype) in pairs]
        there = [dy for dy in own if dy is not None]
        if self._joins(plan, x) and wants[0] and len(there) == len(own):
            dx, flat = self._backward_joined(values, dys, [rows(dy) for dy in there], wants[reads:], dxs[0])
        else:
            needs = Operands.of(plan, wants[reads:])
            saved = lora_passes.Saved(
                plan, siblings.operands, x if lora_passes.saves_x(needs) else None, banks_t, self.draws
            )
            dx, grads = lora_passes.backward(own, saved, needs, x.dtype if wants[0] else None)
            flat = [*grads.weights, *grads.biases, *grads.As, *grads.Bs]
        if not isinstance(dx, LowRankSum):
            dx = plus(dxs[0], None if dx is None else dx.view(x.shape))
        return (dx,) if reads == 1 else (dx, plus(dxs[1], in_dtype(there[0], self.residual_dtype))), flat

    def _backward_joined(
        self,
        values: Mapping[str, Any],
        given: Sequence[Any],
        dys: Sequence[torch.Tensor],
        needs: Sequence[bool],
        dx: Any,
    ) -> tuple[LowRankSum | torch.Tensor, list[torch.Tensor | None]]:
        """dx (T, K), and the gradients of the operands, which are in the order of ``flattened``.

        Args:
            values: those that the stage needs.
            given: the gradients of its results as they came, ``dys`` are those (T, N).
            needs: which of the operands' are wanted.
            dx: what other stages have added to it.
        """
        x, (t_TR,) = (values[name] for name in self.stage.needs)
        n, m = len(dys), len(self.siblings.operands.As)
        grads: list[torch.Tensor | None] = [None] * (2 * (n + m))
        made = self.stage.group.again(self.siblings, x.dtype)
        if self.stage.dense_gradient:
            dx_TK, u_TR = joined.backward_apart(dys, made, x.shape[-1], t_TR.shape[1])
        else:
            dx_TK, u_TR = joined.backward_both(dys, made, x.shape[-1], t_TR.shape[1], given[0])
        for i, dy in enumerate(dys):
            if needs[n + i]:
                grads[n + i] = dy.sum(0, dtype=self.siblings.operands.biases[i].dtype)
        if made.A_RK is None:
            return dx_TK, grads
        first, ranks, taker = 2 * n, self.siblings.plan(x).banks[0].ranks, self.stage.taker if dx is None else None
        dA_RK, is_owed = None, False
        if any(needs[first : first + m]):
            is_owed = taker is not None and taker.fills(values, u_TR)
            dA_RK = self._dA(u_TR, rows(x), is_owed)
            grads[first : first + m] = split(dA_RK, ranks, 0)
        grads[first + m :] = self._dBs(self.siblings.plan(x), given, dys, t_TR, needs[first + m :])
        if taker is None:
            return dx_TK.addmm_(u_TR, made.A_RK), grads
        return LowRankSum(dx_TK, u_TR, made.A_RK, dA_RK if is_owed else None), grads

    def _dA(self, u_TR: torch.Tensor, x_TK: torch.Tensor, is_owed: bool) -> torch.Tensor:
        """uᵀ x (R, K); only the memory for it where it is left to another stage."""
        dtype = self.siblings.operands.As[0].dtype
        if is_owed:
            return u_TR.new_empty(u_TR.shape[1], x_TK.shape[1], dtype=dtype)
        return product(u_TR.t(), x_TK, dtype)

    def _dBs(
        self,
        plan: Plan,
        given: Sequence[Any],
        dys: Sequence[torch.Tensor],
        t_TR: torch.Tensor,
        needs: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        """s dyᵀ t (N, R) of each adapter, from the product that came with dy where one did."""
        grads, first = [], 0
        for owner, B_NR, scale, needed in zip(plan.owners, self.siblings.operands.Bs, plan.scales, needs, strict=True):
            dy, count, grad = given[owner], B_NR.shape[1], None
            there = dy.columns(first, count) if needed and isinstance(dy, Contracted) else None
            if there is not None:
                grad = torch.mul(there, scale, out=torch.empty_like(there, dtype=B_NR.dtype))
            elif needed:
                grad = product(dys[owner].t(), t_TR.narrow(1, first, count), B_NR.dtype, scale)
            grads.append(grad)
            first += count
        return grads
