"""Linears with low-rank adapters (LoRA: Hu et al., arXiv:2106.09685), those that share an input at once.

    t_ij = x̃_ij A_ijᵀ     y_i = x W_iᵀ + b_i + Σ_j s_ij t_ij B_ijᵀ      i: siblings (q/k/v, gate/up), j: active adapters
    u_ij = s_ij dy_i B_ij           dx = Σ_i dy_i W_i + Σ_ij (u_ij A_ij) m_ij / (1 - p_ij)
    dA_ij = u_ijᵀ x̃_ij              dB_ij = s_ij dy_iᵀ t_ij       db_i = Σ_T dy_i       dW_i = dy_iᵀ x

x̃ = x m / (1 - p) is x after the adapter's own dropout, x itself where p = 0. The masks m are drawn again in the
backward (``dropout.py``) and never kept.

One autograd Function saves x once and every t (T, r), and asks a weight for its dense matrix only for the product that
needs it, so that of 4-bit weights one is dense at a time. All A of a group go through x in one product, and into dx
and dA in one each (an adapter with dropout alone). Sums are taken inside products, in float32: y starts as an adapter's
term and dx as the first sibling's, and the next product adds to it as it rounds.

Dtypes are PEFT's: an adapter computes in A's dtype, or in autocast's where that is on; y has the dtype that the plain
linear returns (``frozen_weight.py``). rsLoRA is another s.
Left out: DoRA, ``lora_bias``; second derivatives (they raise).

For callers with a backward of their own, where autograd records nothing (as inside a Function); autocast matters only
as an argument of ``plan_of``:

    plan = plan_of(linears, x.shape, x.dtype, autocast_dtype(x))       cached: the same object for the same shapes,
                                                                       dtypes, scales and dropouts; it holds no tensor
    operands = operands_of(linears)                                    weights, biases, As, Bs, read anew at each call
    needs = needs_of(operands)                                         which of them require a gradient
    ys, banks_t, draws = forward(x, plan, operands)
    saved = Saved(plan, operands, x if saves_x(needs) else None, banks_t if any(needs.Bs) else (), draws)
    dx_TK, grads = backward(dys, saved, needs, x.dtype)                None for x_dtype: no dx

``forward(x, plan, operands, draws)`` computes the same again, masks included, and leaves the random stream as it is.
``forward(x, plan, operands, outs=[...])`` writes each y to a given (T, N), which may be columns of a wider buffer;
dys may be such columns too. Gradients are those of the operands in their own dtypes: ``grads.weights[i]`` (N, K),
``grads.biases[i]``, ``grads.As[j]``, ``grads.Bs[j]``; None where not needed.

Shapes: T tokens (the leading dimensions of x), K inputs, N outputs, R the ranks of all adapters of a bank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sloth_kernels.adapters import (
    Adapter,
    Bank,
    LoraLinear,
    Operands,
    Plan,
    autocast_dtype,
    flattened,
    operands_of,
    plan_of,
)
from sloth_kernels.cases.lora import Scales, cases, dense_linears, timings
from sloth_kernels.dropout import drop, generator_of, replaying
from sloth_kernels.frozen_weight import DenseWeight, Weight
from sloth_kernels.op import Op
from sloth_kernels.products import Casts, add_product, in_dtype, product, rows, split, stacked

Draws = tuple[torch.Tensor | None, ...]
"""The generator's state before each bank's mask was drawn, None for a bank without dropout; empty where none has."""


def reference(x: torch.Tensor, linears: Sequence[LoraLinear]) -> tuple[torch.Tensor, ...]:
    """The truth: what PEFT's ``lora.Linear`` and ``lora.Linear4bit`` compute, under autocast too."""
    return tuple(_reference_of_one(x, *linear) for linear in linears)


def _reference_of_one(
    x: torch.Tensor, weight: Weight, bias_N: torch.Tensor | None, adapters: Sequence[Adapter]
) -> torch.Tensor:
    autocast = autocast_dtype(x)
    product_dtype, base_dtype = weight.dtypes(x.dtype, autocast)
    with torch.autocast(x.device.type, enabled=False):
        bias_N = None if bias_N is None else bias_N.to(product_dtype)
        y = F.linear(x.to(product_dtype), weight.dense(product_dtype), bias_N).to(base_dtype)
    for A_RK, B_NR, scale, p in adapters:
        if not (weight.rounds_each and torch.is_autocast_enabled()):
            x = x.to(A_RK.dtype)
        term = F.linear(F.linear(F.dropout(x, p), A_RK), B_NR) * scale
        y = y + (term.to(y.dtype) if weight.rounds_each and autocast is None else term)
    return y if weight.rounds_each else y.to(base_dtype)


# Forward ------------------------------------------------------------------------------------------------------------


class Computed(NamedTuple):
    """What ``forward`` returns."""

    ys: tuple[torch.Tensor, ...]
    """Each sibling's y (..., N), or the given (T, N)."""
    banks_t: list[torch.Tensor]
    """Each bank's t (T, R)."""
    draws: Draws


def forward(
    x: torch.Tensor,
    plan: Plan,
    operands: Operands[Any],
    draws: Draws | None = None,
    outs: Sequence[torch.Tensor] | None = None,
) -> Computed:
    """Every sibling's y and every bank's t; the file's docstring says how to call it."""
    x_TK = rows(x)
    casts = Casts(x_TK)
    drawn, dropped = _dropped(x_TK, plan, draws) if plan.drops else ((), {})
    terms: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    banks_t: list[torch.Tensor] = []
    for k, (dtype, members, ranks, _, _) in enumerate(plan.banks):
        A_RK = stacked([operands.As[j] for j in members], dtype)
        t_TR = product(dropped[k] if k in dropped else casts.to(dtype), A_RK.t(), dtype)
        banks_t.append(t_TR)
        for j, own_t_TR in zip(members, split(t_TR, ranks), strict=True):
            terms[j] = own_t_TR, in_dtype(operands.Bs[j], dtype).t(), plan.scales[j]

    ys = []
    for i, (product_dtype, y_dtype) in enumerate(plan.dtypes):
        n_out, sum_dtype = plan.shapes[i][0], plan.sum_dtypes[i]
        in_place = outs is not None and outs[i].dtype == sum_dtype == y_dtype
        y_TN = outs[i] if outs is not None and in_place else x_TK.new_empty(x_TK.shape[0], n_out, dtype=sum_dtype)
        own_terms = [terms[j] for j in plan.own[i]]
        _linear(y_TN, casts.to(product_dtype), operands.weights[i], operands.biases[i], own_terms)
        if outs is None:
            y = in_dtype(y_TN, y_dtype)
            ys.append(y if x.dim() == 2 else y.view(*x.shape[:-1], n_out))
        else:
            ys.append(y_TN if in_place else outs[i].copy_(y_TN))
    return Computed(tuple(ys), banks_t, drawn)


def _dropped(x_TK: torch.Tensor, plan: Plan, draws: Draws | None) -> tuple[Draws, dict[int, torch.Tensor]]:
    """Each bank's x̃ where it has dropout, drawn now or as ``draws`` says, and the states they were drawn from."""
    generator = generator_of(x_TK.device)
    states: list[torch.Tensor | None] = []
    dropped: dict[int, torch.Tensor] = {}
    with nullcontext() if draws is None else replaying(x_TK.device):
        for k, bank in enumerate(plan.banks):
            state = None if not bank.dropout else generator.get_state() if draws is None else draws[k]
            states.append(state)
            if state is not None:
                if draws is not None:
                    generator.set_state(state)
                dropped[k] = _drop_for(x_TK, bank)[0]
    return tuple(states), dropped


def _drop_for(x_TK: torch.Tensor, bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    """x̃ in the bank's dtype, and its mask."""
    dropped, keep = drop(in_dtype(x_TK, bank.drop_dtype or x_TK.dtype), bank.dropout)
    return in_dtype(dropped, bank.dtype), keep


def _linear(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    weight: Weight,
    bias_N: torch.Tensor | None,
    terms: list[tuple[torch.Tensor, torch.Tensor, float]],
) -> None:
    """Fill y. The first term goes first, for the long product to add to in its last step: coming after, it would read y
    once more. With a bias the long product is first, as its size must not cost the term its last bits."""
    n_before = 0 if bias_N is not None else min(1, len(terms))
    for t_TR, B_RN, scale in terms[:n_before]:
        add_product(y_TN, t_TR, B_RN, scale, first=True)
    W_KN = weight.dense(x_TK.dtype).t()
    if bias_N is not None and y_TN.dtype == x_TK.dtype:
        torch.addmm(in_dtype(bias_N, y_TN.dtype), x_TK, W_KN, out=y_TN)
    else:
        if bias_N is not None:
            y_TN.copy_(in_dtype(bias_N, x_TK.dtype))
        add_product(y_TN, x_TK, W_KN, first=bias_N is None and n_before == 0)
    del W_KN
    for t_TR, B_RN, scale in terms[n_before:]:
        add_product(y_TN, t_TR, B_RN, scale)


# Backward -----------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the backward reads."""

    plan: Plan
    operands: Operands[Any]
    x: torch.Tensor | None
    """None where ``saves_x`` says that it is not needed."""
    banks_t: Sequence[torch.Tensor]
    """Empty where no B needs a gradient."""
    draws: Draws = ()


def saves_x(needs: Operands[bool]) -> bool:
    """Whether the backward reads x: for the gradient of an A or of a weight."""
    return any(needs.As) or any(needs.weights)


def backward(
    dys: Sequence[torch.Tensor | None], saved: Saved, needs: Operands[bool], x_dtype: torch.dtype | None
) -> tuple[torch.Tensor | None, Operands[torch.Tensor | None]]:
    """dx (T, K) in ``x_dtype``, unless that is None, and the gradients that ``needs`` asks for.

    ``dys`` has None for a y that nothing depends on. Masks are drawn from ``saved.draws``; the random stream is left as
    it was.
    """
    plan = saved.plan
    n, m = len(dys), len(plan.scales)
    grads: Operands[torch.Tensor | None] = Operands([None] * n, [None] * n, [None] * m, [None] * m)
    dy_casts = {i: Casts(rows(dy)) for i, dy in enumerate(dys) if dy is not None}
    if not dy_casts:
        return None, grads
    dx_TK = None if x_dtype is None else _dx_through_W(dy_casts, saved, x_dtype)
    x = None if saved.x is None else Casts(rows(saved.x))
    if x is None and dx_TK is not None:
        # Only its form is read: by the masks that are drawn for it.
        x = Casts(dx_TK.new_empty(dx_TK.shape, dtype=x_dtype) if plan.drops else dx_TK)
    _of_weights_and_biases(dy_casts, x, saved, needs, grads)
    with replaying(next(iter(dy_casts.values())).tensor.device) if plan.drops else nullcontext():
        for k in range(len(plan.banks)):
            _of_bank(k, dy_casts, x, saved, needs, dx_TK, grads)
    return None if dx_TK is None or x_dtype is None else in_dtype(dx_TK, x_dtype), grads


def _of_weights_and_biases(
    dy_casts: dict[int, Casts], x: Casts | None, saved: Saved, needs: Operands[bool], grads: Operands[Any]
) -> None:
    """Fill in dW and db."""
    for i, dy in dy_casts.items():
        if needs.biases[i]:
            grads.biases[i] = dy.tensor.sum(0, dtype=saved.operands.biases[i].dtype)
        if needs.weights[i] and x is not None:
            dtype = saved.plan.dtypes[i][0]
            grads.weights[i] = product(dy.to(dtype).t(), x.to(dtype), saved.operands.weights[i].trained.dtype)


def _dx_through_W(dy_casts: dict[int, Casts], saved: Saved, dtype: torch.dtype) -> torch.Tensor:
    """Σ_i dy_i W_i, in ``dtype`` or what the terms to come need."""
    plan = saved.plan
    some_dy = next(iter(dy_casts.values())).tensor
    sum_dtype = torch.promote_types(plan.dx_dtype, dtype)
    dx_TK = some_dy.new_empty(some_dy.shape[0], plan.shapes[0][1], dtype=sum_dtype)
    for nth, (i, dy) in enumerate(dy_casts.items()):
        product_dtype = plan.dtypes[i][0]
        add_product(dx_TK, dy.to(product_dtype), saved.operands.weights[i].dense(product_dtype), first=nth == 0)
    return dx_TK


def _of_bank(
    k: int,
    dy_casts: dict[int, Casts],
    x: Casts | None,
    saved: Saved,
    needs: Operands[bool],
    dx_TK: torch.Tensor | None,
    grads: Operands[Any],
) -> None:
    """Fill in a bank's dA and dB, and add its term to dx where there is one."""
    plan, operands, bank = saved.plan, saved.operands, saved.plan.banks[k]
    dys = {j: dy_casts[i].to(bank.dtype) for j in bank.members if (i := plan.owners[j]) in dy_casts}
    if any(needs.Bs):
        for j, t_TR in zip(bank.members, split(saved.banks_t[k], bank.ranks), strict=True):
            if needs.Bs[j] and j in dys:
                grads.Bs[j] = product(dys[j].t(), t_TR, operands.Bs[j].dtype, plan.scales[j])
    needs_A = any(needs.As[j] for j in bank.members)
    if x is None or not dys or not (needs_A or dx_TK is not None):
        return
    u_TR = _u(dys, bank, saved)
    if (state := saved.draws[k] if bank.dropout else None) is not None:
        generator_of(u_TR.device).set_state(state)
        x_TK, keep_TK = _drop_for(x.tensor, bank)
    else:
        x_TK, keep_TK = x.to(bank.dtype) if needs_A else None, None
    if dx_TK is not None:
        _add_through_A(dx_TK, u_TR, keep_TK, bank, operands)
    if needs_A and x_TK is not None:
        _of_As(u_TR, x_TK, bank, dys, operands, grads)


def _u(dys: dict[int, torch.Tensor], bank: Bank, saved: Saved) -> torch.Tensor:
    """A bank's u, 0 for siblings that nothing depends on."""
    some_dy = next(iter(dys.values()))
    u_TR = some_dy.new_empty(some_dy.shape[0], sum(bank.ranks))
    for j, own_u_TR in zip(bank.members, split(u_TR, bank.ranks), strict=True):
        if j in dys:
            B_NR = in_dtype(saved.operands.Bs[j], bank.dtype)
            add_product(own_u_TR, dys[j], B_NR, saved.plan.scales[j], first=True)
        else:
            own_u_TR.zero_()
    return u_TR


def _add_through_A(
    dx_TK: torch.Tensor, u_TR: torch.Tensor, keep_TK: torch.Tensor | None, bank: Bank, operands: Operands[Any]
) -> None:
    """``dx += u A``, behind the mask where there is one."""
    A_RK = stacked([operands.As[j] for j in bank.members], bank.dtype)
    if keep_TK is None:
        add_product(dx_TK, u_TR, A_RK)
    elif bank.dropout < 1:
        dx_TK.addcmul_(product(u_TR, A_RK, dx_TK.dtype, 1 / (1 - bank.dropout)), keep_TK)


def _of_As(
    u_TR: torch.Tensor,
    x_TK: torch.Tensor,
    bank: Bank,
    members: Collection[int],
    operands: Operands[Any],
    grads: Operands[Any],
) -> None:
    """Fill in dA of those ``members`` of a bank."""
    As = [operands.As[j] for j in bank.members]
    dA_RK = product(u_TR.t(), x_TK, max((A_RK.dtype for A_RK in As), key=lambda dtype: dtype.itemsize))
    for j, A_RK, own_dA_RK in zip(bank.members, As, split(dA_RK, bank.ranks, 0), strict=True):
        grads.As[j] = in_dtype(own_dA_RK, A_RK.dtype) if j in members else None


# Autograd -----------------------------------------------------------------------------------------------------------


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: Plan, weights: list[Weight], *flat: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        operands = Operands.of(plan, flat)._replace(weights=weights)
        ys, banks_t, draws = forward(x, plan, operands)
        needs = Operands.of(plan, ctx.needs_input_grad[3:])
        ctx.plan, ctx.weights, ctx.needs, ctx.draws, ctx.x_form = plan, weights, needs, draws, (x.shape, x.dtype)
        ctx.save_for_backward(x if saves_x(needs) else None, *flat, *(banks_t if any(needs.Bs) else ()))
        ctx.n_flat = len(flat)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # torch's once_differentiable lets a constant upstream gradient pass, and second derivatives silently be 0.
        if torch.is_grad_enabled():
            raise RuntimeError("lora_linears has no second derivative: call backward without create_graph=True")
        x, *tensors = ctx.saved_tensors
        operands = Operands.of(ctx.plan, tensors[: ctx.n_flat])
        trained = [w if t is None else DenseWeight(t) for w, t in zip(ctx.weights, operands.weights, strict=True)]
        saved = Saved(ctx.plan, operands._replace(weights=trained), x, tensors[ctx.n_flat :], ctx.draws)
        shape, dtype = ctx.x_form
        dx, grads = backward(dys, saved, ctx.needs, dtype if ctx.needs_input_grad[0] else None)
        dx = None if dx is None else dx.view(shape)
        return dx, None, None, *grads.weights, *grads.biases, *grads.As, *grads.Bs


def lora_linears(x: torch.Tensor, linears: Sequence[LoraLinear]) -> tuple[torch.Tensor, ...]:
    """The y (..., N) of each of ``linears`` for ``x`` (..., K), differentiable once in x, weights, biases and adapters.

    Adapters with dropout draw from the device's default generator, as PEFT's modules do.

    Only what requires a gradient is computed: without one for x no frozen weight is needed in the backward. Raises
    ``ValueError`` for shapes that do not fit together and ``RuntimeError`` for a weight that has not x's dtype where
    the stock linear would mind.
    """
    plan = plan_of(linears, x.shape, x.dtype, autocast_dtype(x))
    operands = operands_of(linears)
    if torch.is_grad_enabled():
        flat = flattened(operands)
        if x.requires_grad or any(t is not None and t.requires_grad for t in flat):
            return _LoraLinears.apply(x, plan, operands.weights, *flat)
    with torch.no_grad():
        return forward(x, plan, operands).ys


# Cases --------------------------------------------------------------------------------------------------------------


def _flat(x: torch.Tensor, scales: Scales, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """``lora_linears`` with every tensor an argument of its own."""
    return lora_linears(x, dense_linears(scales, tensors))


def _flat_reference(x: torch.Tensor, scales: Scales, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return reference(x, dense_linears(scales, tensors))


OP = Op(
    "lora",
    _flat,
    _flat_reference,
    cases,
    timings,
    # Half of the spacing to the next value: where stock's several roundings happen to cancel, ours is one.
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    launches=False,
)
