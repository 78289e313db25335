"""Frozen linears with low-rank adapters (LoRA: Hu et al., arXiv:2106.09685), those that share an input at once.

    t_ij = x A_ijᵀ      y_i = x W_iᵀ + b_i + Σ_j s_ij t_ij B_ijᵀ      i: siblings (q/k/v, gate/up), j: active adapters
    u_ij = s_ij dy_i B_ij           dx = Σ_i dy_i W_i + Σ_ij u_ij A_ij
    dA_ij = u_ijᵀ x                 dB_ij = s_ij dy_iᵀ t_ij               db_i = Σ_T dy_i

One autograd Function saves x once and every t (T, r), and asks a weight for its dense matrix only for the product that
needs it, so that of 4-bit weights one is dense at a time. All A of a group go through x in one product, and into dx
and dA in one each. Sums are taken inside products, in float32: y starts as an adapter's term and dx as the first
sibling's, and the next product adds to it as it rounds.

Dtypes are PEFT's: an adapter computes in A's dtype, or in autocast's where that is on; y has the dtype that the frozen
linear returns (``frozen_weight.py``). rsLoRA is another s.
Left out: dropout, DoRA, ``lora_bias``; weights W that train (they raise); second derivatives (they raise).

Shapes: T tokens (the leading dimensions of x), K inputs, N outputs, R the ranks of all adapters of a bank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sloth_kernels.adapters import Adapter, Bank, LoraLinear, Operands, Plan, autocast_dtype, flattened, plan_of
from sloth_kernels.frozen_weight import DenseWeight, Weight
from sloth_kernels.op import Call, Case, Op, Timing
from sloth_kernels.products import Casts, add_product, in_dtype, product, rows, stacked


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
    for A_RK, B_NR, scale in adapters:
        x = x.to(A_RK.dtype)
        term = F.linear(F.linear(x, A_RK), B_NR) * scale
        y = y + (term.to(y.dtype) if weight.rounds_each and autocast is None else term)
    return y if weight.rounds_each else y.to(base_dtype)


# Forward ------------------------------------------------------------------------------------------------------------


def forward(
    x: torch.Tensor, plan: Plan, operands: Operands[Any]
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Every sibling's y and every bank's t."""
    casts = Casts(rows(x))
    terms: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    banks_t: list[torch.Tensor] = []
    for bank in plan.banks:
        A_RK = stacked([operands.As[j] for j in bank.members], bank.dtype)
        t_TR = product(casts.to(bank.dtype), A_RK.t(), bank.dtype)
        banks_t.append(t_TR)
        for j, columns in zip(bank.members, bank.columns, strict=True):
            terms[j] = t_TR[:, columns], in_dtype(operands.Bs[j], bank.dtype).t(), plan.scales[j]

    ys = []
    for i, weight in enumerate(plan.weights):
        product_dtype, y_dtype = plan.dtypes[i]
        y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=plan.sum_dtypes[i])
        own_terms = [terms[j] for j, owner in enumerate(plan.owners) if owner == i]
        _linear(y.view(-1, weight.shape[0]), casts.to(product_dtype), weight, operands.biases[i], own_terms)
        ys.append(in_dtype(y, y_dtype))
    return tuple(ys), banks_t


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
    """None where no A needs a gradient."""
    banks_t: Sequence[torch.Tensor]
    """Empty where no B needs a gradient."""


def backward(
    dys: Sequence[torch.Tensor | None], saved: Saved, needs: Operands[bool], x_dtype: torch.dtype | None
) -> tuple[torch.Tensor | None, Operands[torch.Tensor | None]]:
    """dx (T, K) in ``x_dtype``, unless that is None, and the gradients that ``needs`` asks for.

    ``dys`` has None for a y that nothing depends on.
    """
    plan = saved.plan
    grads = Operands[torch.Tensor | None]([None] * len(dys), [None] * len(plan.scales), [None] * len(plan.scales))
    dy_casts = {i: Casts(rows(dy)) for i, dy in enumerate(dys) if dy is not None}
    if not dy_casts:
        return None, grads
    for i, dy in dy_casts.items():
        if needs.biases[i]:
            grads.biases[i] = dy.tensor.sum(0, dtype=saved.operands.biases[i].dtype)
    dx_TK = None if x_dtype is None else _frozen_dx(dy_casts, plan, x_dtype)
    x = None if saved.x is None else Casts(rows(saved.x))
    for k, bank in enumerate(plan.banks):
        member_dys = {j: dy_casts[i].to(bank.dtype) for j in bank.members if (i := plan.owners[j]) in dy_casts}
        for j, columns in zip(bank.members, bank.columns, strict=True):
            if needs.Bs[j] and j in member_dys:
                dtype = saved.operands.Bs[j].dtype
                grads.Bs[j] = product(member_dys[j].t(), saved.banks_t[k][:, columns], dtype, plan.scales[j])
        needs_A = any(needs.As[j] for j in bank.members)
        if member_dys and (needs_A or dx_TK is not None):
            x_TK = x.to(bank.dtype) if needs_A and x is not None else None
            _through_A(member_dys, bank, saved, x_TK, dx_TK, grads)
    return None if dx_TK is None or x_dtype is None else in_dtype(dx_TK, x_dtype), grads


def _frozen_dx(dy_casts: dict[int, Casts], plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """Σ_i dy_i W_i, in ``dtype`` or what the terms to come need."""
    some_dy = next(iter(dy_casts.values())).tensor
    sum_dtype = functools.reduce(torch.promote_types, plan.sum_dtypes, dtype)
    dx_TK = some_dy.new_empty(len(some_dy), plan.weights[0].shape[1], dtype=sum_dtype)
    for nth, (i, dy) in enumerate(dy_casts.items()):
        product_dtype = plan.dtypes[i][0]
        add_product(dx_TK, dy.to(product_dtype), plan.weights[i].dense(product_dtype), first=nth == 0)
    return dx_TK


def _through_A(
    member_dys: dict[int, torch.Tensor],
    bank: Bank,
    saved: Saved,
    x_TK: torch.Tensor | None,
    dx_TK: torch.Tensor | None,
    grads: Operands[torch.Tensor | None],
) -> None:
    """Work out a bank's u, add u A to dx where there is one, and fill in the gradients of A where there is an x."""
    As = [saved.operands.As[j] for j in bank.members]
    some_dy = next(iter(member_dys.values()))
    u_TR = some_dy.new_empty(len(some_dy), bank.columns[-1].stop)
    for j, columns in zip(bank.members, bank.columns, strict=True):
        if j in member_dys:
            B_NR = in_dtype(saved.operands.Bs[j], bank.dtype)
            add_product(u_TR[:, columns], member_dys[j], B_NR, saved.plan.scales[j], first=True)
        else:
            u_TR[:, columns].zero_()
    if dx_TK is not None:
        add_product(dx_TK, u_TR, stacked(As, bank.dtype))
    if x_TK is not None:
        dA_RK = product(u_TR.t(), x_TK, max((A_RK.dtype for A_RK in As), key=lambda dtype: dtype.itemsize))
        for j, A_RK, columns in zip(bank.members, As, bank.columns, strict=True):
            grads.As[j] = in_dtype(dA_RK[columns], A_RK.dtype) if j in member_dys else None


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan, *flat: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        operands = Operands[Any].of(plan, flat)
        ys, banks_t = forward(x, plan, operands)
        needs = Operands[bool].of(plan, ctx.needs_input_grad[2:])
        ctx.plan, ctx.needs, ctx.x_form = plan, needs, (x.shape, x.dtype)
        ctx.save_for_backward(x if any(needs.As) else None, *flat, *(banks_t if any(needs.Bs) else ()))
        ctx.n_flat = len(flat)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # torch's once_differentiable lets a constant upstream gradient pass, and second derivatives silently be 0.
        if torch.is_grad_enabled():
            raise RuntimeError("lora_linears has no second derivative: call backward without create_graph=True")
        x, *tensors = ctx.saved_tensors
        operands = Operands[Any].of(ctx.plan, tensors[: ctx.n_flat])
        saved = Saved(ctx.plan, operands, x, tensors[ctx.n_flat :])
        shape, dtype = ctx.x_form
        dx, grads = backward(dys, saved, ctx.needs, dtype if ctx.needs_input_grad[0] else None)
        return None if dx is None else dx.view(shape), None, *grads.biases, *grads.As, *grads.Bs


def lora_linears(x: torch.Tensor, linears: Sequence[LoraLinear]) -> tuple[torch.Tensor, ...]:
    """The y (..., N) of each of ``linears`` for ``x`` (..., K), differentiable once in x, the biases and the adapters.

    Only what requires a gradient is computed: without one for x no weight is needed in the backward. Raises
    ``ValueError`` for shapes that do not fit together and ``RuntimeError`` for a weight that requires a gradient or has
    not x's dtype where the stock linear would mind.
    """
    plan = plan_of(linears, x.shape, x.dtype, autocast_dtype(x))
    flat = flattened(linears)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        return _LoraLinears.apply(x, plan, *flat)
    with torch.no_grad():
        return forward(x, plan, Operands[Any].of(plan, flat))[0]


# Cases --------------------------------------------------------------------------------------------------------------

Scales = tuple[tuple[float, ...], ...]


def dense_linears(scales: Scales, tensors: Sequence[Any]) -> list[LoraLinear]:
    """Linears of ``tensors`` that are arguments of their own: for each sibling its weight, its bias, and A and B for
    each of its scales."""
    left = list(tensors)
    linears = []
    for own in scales:
        weight, bias, *adapters = (left.pop(0) for _ in range(2 + 2 * len(own)))
        pairs = zip(adapters[::2], adapters[1::2], own, strict=True)
        linears.append(LoraLinear(DenseWeight(weight), bias, [Adapter(*pair) for pair in pairs]))
    return linears


def _flat(x: torch.Tensor, scales: Scales, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """``lora_linears`` with every tensor an argument of its own."""
    return lora_linears(x, dense_linears(scales, tensors))


def _flat_reference(x: torch.Tensor, scales: Scales, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return reference(x, dense_linears(scales, tensors))


def random_tensors(
    generator: torch.Generator,
    n_in: int,
    outputs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    dtypes: tuple[torch.dtype, torch.dtype],
    trained: str,
    bias: bool,
) -> list[torch.Tensor | None]:
    """What ``dense_linears`` takes, of such sizes that y is about as large as x; ``dtypes`` are the frozen tensors' and
    the adapters'."""

    def randn(*size: int, std: float, dtype: torch.dtype, kind: str = "") -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=generator.device) * std
        return values.to(dtype).requires_grad_(kind in trained if kind else False)

    dtype, adapter_dtype = dtypes
    tensors: list[torch.Tensor | None] = []
    for n_out, own in zip(outputs, ranks, strict=True):
        tensors.append(randn(n_out, n_in, std=n_in**-0.5, dtype=dtype))
        tensors.append(randn(n_out, std=1.0, dtype=dtype, kind="b") if bias else None)
        for rank in own:
            tensors.append(randn(rank, n_in, std=n_in**-0.5, dtype=adapter_dtype, kind="A"))
            tensors.append(randn(n_out, rank, std=rank**-0.5, dtype=adapter_dtype, kind="B"))
    return tensors


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    trained: str = "xAB",
    bias: bool = False,
    wide: bool = False,
    strided: bool = False,
) -> Case:
    """``ranks`` lists each sibling's adapters; ``trained`` names what needs a gradient: x, A, B, b(ias); ``wide``
    adapters are float32 whatever x's dtype; a ``strided`` x is a slice of wider rows."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)
        n_in = shape[-1]
        x = torch.randn(*shape[:-1], n_in + 5 * strided, generator=generator, device=device).to(dtype)[..., :n_in]
        dtypes = dtype, torch.promote_types(dtype, torch.float32) if wide else dtype
        tensors = random_tensors(generator, n_in, outputs, ranks, dtypes, trained, bias)
        scales = tuple(tuple(0.5 + rank / 8 for rank in own) for own in ranks)
        return (x.requires_grad_("x" in trained), scales, *tensors), {}

    return Case(name, make)


def cases() -> Sequence[Case]:
    """One to three siblings, ranks of 1, 8 and 33, several adapters or none, each choice of what trains."""
    return [
        _case("one", (37, 33), [41], [[8]]),
        _case("qkv", (2, 9, 48), [40, 24, 24], [[8], [8], [8]]),
        _case("gate_up", (3, 5, 40), [72, 72], [[33], [33]], strided=True),
        _case("rank_1_bias", (2, 3, 4, 24), [17], [[1]], bias=True, trained="xABb"),
        _case("frozen_bias_float32_adapters", (21, 24), [32, 16], [[8], [1]], bias=True, wide=True),
        _case("float32_adapters", (21, 24), [32, 16], [[8], [8]], wide=True),
        _case("several_adapters", (19, 32), [24, 40], [[8, 1], [33, 8, 2]]),
        _case("one_without_adapters", (19, 32), [24, 40], [[], [8]]),
        _case("first_layer", (19, 32), [24, 40], [[8], [8]], trained="AB"),
        _case("frozen_adapters", (19, 32), [24, 40], [[8], [8]], trained="x"),
        _case("only_B", (19, 32), [24], [[8]], trained="B"),
        _case("one_token", (1, 64), [96, 32], [[8], [8]]),
    ]


def timings() -> Sequence[Timing]:
    """Llama 8B's query, key and value projections, gate and up, and down, on 4,096 tokens at rank 32."""
    groups = [("qkv", 4096, [4096, 1024, 1024]), ("gate_up", 4096, [14336, 14336]), ("down", 14336, [4096])]
    return [
        Timing(_case(name, (4096, n_in), outputs, [[32]] * len(outputs)), flops=4 * 4096 * n_in * sum(outputs))
        for name, n_in, outputs in groups
    ]


OP = Op(
    "lora",
    _flat,
    _flat_reference,
    cases,
    timings,
    # Half of the spacing to the next value: where stock's several roundings happen to cancel, ours is one.
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
)
