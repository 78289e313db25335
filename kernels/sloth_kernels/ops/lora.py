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

Shapes: T tokens (the leading dimensions of x), K inputs, N outputs, R the ranks of all adapters of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sloth_kernels.adapters import Adapter, LoraLinear, Operands, Plan, autocast_dtype, flattened, operands_of, plan_of
from sloth_kernels.cases.lora import Scales, cases, dense_linears, timings
from sloth_kernels.frozen_weight import DenseWeight, Weight
from sloth_kernels.lora_passes import Saved, backward, forward, saves_x
from sloth_kernels.op import Op


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
