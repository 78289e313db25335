"""The stage of linears that share an input, with their adapters.

Where the dense weights are kept (``dense_cache.py``) and everything is of one dtype, a weight and its adapters are one
product each way; in all other cases ``lora_passes.py`` computes the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sloth_kernels import lora_passes
from sloth_kernels.adapters import LoraLinear, Operands, Plan, Siblings
from sloth_kernels.dense_cache import DenseGroup, Joined
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

    def forget(self) -> None:
        """Keep no tensor of its linears until it is bound again; what they cost is still known."""
        self.forms()
        self._siblings = None

    def room(self) -> int:
        """The columns that it would have behind x, as it was bound last."""
        return self._columns if self.group.keeps else 0

    def contractions(self) -> Sequence[tuple[int, int]]:
        """Of which columns of t, (first, count), each dy's product is of use, as it was bound last; 0 where of none."""
        if self._siblings is None or not self.group.keeps:
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
        """The largest dense weight that is made for its product, and what wide adapters have x, dx and dy cast to."""
        dense = max((2 * math.prod(form.shape) for form in self._in_4bit()), default=0)
        return dense + int(tokens * max((self._wide_bytes(form, widths, autocast) for form in self.forms()), default=0))

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
        columns = self.group.columns_for(sum(form.rank for form in forms))
        return sum(2 * form.shape[0] * (form.shape[1] + columns) for form in forms)

    def _in_4bit(self) -> list[_Form]:
        return [form for form in self.forms() if form.in_4bit]

    def bind(self, autocast: torch.dtype | None) -> BoundLinears:
        """With the adapters that are active."""
        linears, siblings = self.read(), self._siblings
        if siblings is None or not siblings.are(linears, autocast):
            siblings = self._siblings = Siblings(linears, autocast)
            self._columns = self.group.columns(linears)
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
        if plan.dtype == x.dtype and siblings.in_4bit and self.stage.group.keeps:
            return self._forward_joined(x, self.stage.group.joined(siblings, x.dtype), residual)
        ys, banks_t, self.draws = lora_passes.forward(x, plan, siblings.operands, self.draws)
        return (*ys, banks_t) if residual is None else (residual + ys[0], banks_t)

    @property
    def recordable(self) -> bool:
        """Masks are drawn anew in each pass."""
        return not self.drops()

    def marks(self) -> list[Any]:
        """What its products read."""
        group, siblings = self.stage.group, self.siblings
        return [siblings, group.keeps, group.made(siblings) if group.keeps else None]

    def drops(self) -> bool:
        """Whether an adapter draws dropout masks."""
        return any(adapter.dropout for linear in self.siblings.linears for adapter in linear.adapters)

    def _forward_joined(self, x: torch.Tensor, made: Joined, residual: torch.Tensor | None) -> tuple[Any, ...]:
        biases, lead = self.siblings.operands.biases, x.shape[:-1]
        x_TK = rows(x)
        t_TR = self._inner(x_TK, made)
        joined_x = _beside(x_TK, t_TR, made.weights[0].shape[1])
        # A product adds one matrix for free: a residual of its dtype, where no bias takes the place.
        taken = residual is not None and biases[0] is None and residual.dtype == x.dtype
        addend = rows(residual) if residual is not None and taken else None
        ys = []
        for W_JN, bias_N in zip(made.transposed, biases, strict=True):
            first = bias_N if addend is None else addend
            if joined_x is None:
                y = _apart(x_TK, t_TR, W_JN, bias_N, addend)
            else:
                y = torch.mm(joined_x, W_JN) if first is None else torch.addmm(first, joined_x, W_JN)
            ys.append(y.view(*lead, y.shape[1]))
        return (*ys, [t_TR]) if residual is None or taken else (residual + ys[0], [t_TR])

    def _inner(self, x_TK: torch.Tensor, made: Joined) -> torch.Tensor:
        """t (T, R), of all adapters side by side."""
        A_RK = self._A(made)
        return x_TK.new_empty(len(x_TK), 0) if A_RK is None else torch.mm(x_TK, A_RK.t())

    def _A(self, made: Joined) -> torch.Tensor | None:
        """All adapters' A (R, K); None where there are no adapters."""
        As = self.siblings.operands.As
        return made.A_RK if made.A_RK is not None or not As else As[0]

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        x, banks_t = (values[name] for name in self.stage.needs)
        siblings, reads = self.siblings, len(self.stage.reads)
        plan, made = siblings.plan(x), self.stage.group.made(siblings)
        pairs = zip(dys, plan.dtypes, strict=False)
        own = [None if dy is None else in_dtype(plain(dy), y_dtype) for dy, (_, y_dtype) in pairs]
        there = [dy for dy in own if dy is not None]
        if made is not None and plan.dtype == x.dtype and wants[0] and len(there) == len(own):
            dx, flat = self._backward_joined(values, dys, [rows(dy) for dy in there], wants[reads:], made, dxs[0])
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
        made: Joined,
        dx: Any,
    ) -> tuple[LowRankSum | torch.Tensor, list[torch.Tensor | None]]:
        """dx (T, K), and the gradients of the operands, which are in the order of ``flattened``.

        Args:
            values: those that the stage needs.
            given: the gradients of its results as they came, ``dys`` are those (T, N).
            needs: which of the operands' are wanted.
            made: what forward's products read.
            dx: what other stages have added to it.
        """
        x, (t_TR,) = (values[name] for name in self.stage.needs)
        n, m = len(dys), len(self.siblings.operands.As)
        grads: list[torch.Tensor | None] = [None] * (2 * (n + m))
        if self.stage.dense_gradient:
            parts = [_parts(weight, x.shape[-1], t_TR.shape[1]) for weight in made.weights]
            dx_TK, u_TR = (_product_sum(dys, weights) for weights in zip(*parts, strict=True))
        else:
            dx_TK, u_TR = _parts(_product_sum(dys, made.weights), x.shape[-1], t_TR.shape[1])
        for i, dy in enumerate(dys):
            if needs[n + i]:
                grads[n + i] = dy.sum(0, dtype=self.siblings.operands.biases[i].dtype)
        A_RK = self._A(made)
        if A_RK is None:
            return dx_TK, grads
        first, ranks, taker = 2 * n, self.siblings.plan(x).banks[0].ranks, self.stage.taker if dx is None else None
        dA_RK, is_owed = None, False
        if any(needs[first : first + m]):
            is_owed = taker is not None and taker.fills(values, u_TR)
            dA_RK = self._dA(u_TR, rows(x), is_owed)
            grads[first : first + m] = split(dA_RK, ranks, 0)
        grads[first + m :] = self._dBs(self.siblings.plan(x), given, dys, t_TR, needs[first + m :])
        if taker is None:
            return dx_TK.addmm_(u_TR, A_RK), grads
        return LowRankSum(dx_TK, u_TR, A_RK, dA_RK if is_owed else None), grads

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


def _beside(x_TK: torch.Tensor, t_TR: torch.Tensor, width: int) -> torch.Tensor | None:
    """[x | t | 0] (T, width), in the columns that were left free behind x; None where there are none."""
    n_in, rank = x_TK.shape[1], t_TR.shape[1]
    if x_TK.stride() != (width, 1) or n_in == width:
        return None
    joined = x_TK.as_strided((x_TK.shape[0], width), (width, 1))
    _, own_TR, *rest = joined.split_with_sizes((n_in, rank, width - n_in - rank), 1)
    own_TR.copy_(t_TR)
    if n_in + rank < width:
        rest[0].zero_()
    return joined


def _parts(joined: torch.Tensor, width: int, rank: int, dim: int = 1) -> Sequence[torch.Tensor]:
    """Views of the first ``width`` columns, or rows, and of the next ``rank``; one call costs less than two slices."""
    return joined.split_with_sizes((width, rank, joined.shape[dim] - width - rank), dim)[:2]


def _product_sum(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the products of pairs."""
    total = torch.mm(lefts[0], rights[0])
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(left, right)
    return total


def _apart(
    x_TK: torch.Tensor,
    t_TR: torch.Tensor,
    W_JN: torch.Tensor,
    bias_N: torch.Tensor | None,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """The product with W_JN (K + columns, N) in two. The short one goes first, for the long one to add to: a term that
    is added to what has been rounded is lost where it is small, as an adapter's is after its first update."""
    rank, more = t_TR.shape[1], bias_N if addend is None else addend
    W_KN, B_RN = _parts(W_JN, x_TK.shape[1], rank, 0)
    if not rank:
        return torch.mm(x_TK, W_KN) if more is None else torch.addmm(more, x_TK, W_KN)
    y = torch.mm(t_TR, B_RN).addmm_(x_TK, W_KN)
    return y if more is None else y.add_(more)
