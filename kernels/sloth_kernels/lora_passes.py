"""The passes of ``ops/lora.py``, forward and backward, as functions.

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

from sloth_kernels.adapters import Bank, Operands, Plan
from sloth_kernels.dropout import drop, generator_of, replaying
from sloth_kernels.frozen_weight import Weight
from sloth_kernels.products import Casts, add_product, in_dtype, product, rows, split, stacked

Draws = tuple[torch.Tensor | None, ...]
"""The generator's state before each bank's mask was drawn, None for a bank without dropout; empty where none has."""


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
    """Fill y. The terms go first, for the long product to add to in its last step: coming after, they would read y once
    more. (On a CPU the sum is rounded once then; cuBLAS rounds the long product before it adds, as stock does.) A bias
    comes last."""
    for nth, (t_TR, B_RN, scale) in enumerate(terms):
        add_product(y_TN, t_TR, B_RN, scale, first=nth == 0)
    W_KN = weight.dense(x_TK.dtype).t()
    if bias_N is not None and not terms and y_TN.dtype == x_TK.dtype:
        torch.addmm(in_dtype(bias_N, y_TN.dtype), x_TK, W_KN, out=y_TN)
        return
    add_product(y_TN, x_TK, W_KN, first=not terms)
    if bias_N is not None:
        y_TN.add_(in_dtype(bias_N, x_TK.dtype))


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
