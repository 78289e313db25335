"""What the kernels can stand in for: three roles, as data and one generic forward each.

A role is matched by structure and admitted by a probe (``match.py``); none names an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sloth_backend.roles import Role

HIDDEN, WIDE = 8, 16
"""Sizes of the small linears that stand in for a module's children in a probe."""

EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(vars(module)[name] for name in names if name in vars(module))


def rms_norm_forward(module: nn.Module, op: Callable[..., Any], variant: str, x: torch.Tensor) -> torch.Tensor:
    """Root mean square normalisation of the last dimension of ``x``."""
    return op(x, module.weight, _first(module, EPS_NAMES), variant)


def rms_norm_probes(module: nn.Module, randn: Callable[..., torch.Tensor]) -> Iterator[tuple[torch.Tensor]]:
    """A few rows of very different magnitude, so that the place of epsilon shows."""
    x = randn(6, *module._parameters["weight"].shape)  # type: ignore[union-attr]
    yield (x * torch.tensor([1e-4, 1e-2, 0.3, 1.0, 7.0, 90.0], dtype=x.dtype)[:, None],)


def glu_forward(module: nn.Module, op: Callable[..., Any], variant: str, x: torch.Tensor) -> torch.Tensor:
    """Gated MLP: ``down_proj(act(gate) * up)``, gate and up from two projections or from the halves of one."""
    children = module._modules
    fused = children.get("gate_up_proj")
    gate, up = fused(x).chunk(2, dim=-1) if fused is not None else (children["gate_proj"](x), children["up_proj"](x))  # type: ignore[misc]
    return children["down_proj"](op(gate, up, variant))  # type: ignore[misc]


def glu_probes(module: nn.Module, randn: Callable[..., torch.Tensor]) -> Iterator[tuple[torch.Tensor]]:
    """Inputs wide enough for the activations' variants to differ in every dtype."""
    yield (randn(2, 33, HIDDEN) * 3,)


def rope_forward(
    module: nn.Module,
    op: Callable[..., Any],
    variant: str,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of queries and keys, (B, heads, S, D) with cos and sin (B, S, R), R <= D."""
    return op(q, k, cos, sin, variant, unsqueeze_dim)


def rope_probes(module: nn.Module, randn: Callable[..., torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Full and partial rotation, cos and sin in the module's dtype and in float32; the halves of cos differ.

    Models hand over cos and sin whose halves are equal, or whose pairs are; the function must not depend on it
    where ours does not.
    """
    for rotated in (HIDDEN, HIDDEN // 2):
        for cast in (True, False):
            angles = randn(2, 5, rotated).float()
            cos, sin = (t.to(randn(1).dtype) if cast else t for t in (angles.cos(), angles.sin()))
            yield randn(2, 3, 5, HIDDEN), randn(2, 1, 5, HIDDEN), cos, sin


ROLES = [
    Role(
        name="rms_norm",
        op="rms_norm",
        forward=rms_norm_forward,
        probes=rms_norm_probes,
        parameters={"weight": 1},
        attributes=(EPS_NAMES,),
    ),
    Role(
        name="glu",
        op="glu",
        forward=glu_forward,
        probes=glu_probes,
        children=(
            {"gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE)},
            {"gate_up_proj": (2 * WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE)},
        ),
    ),
    Role(
        name="rope",
        op="rope",
        forward=rope_forward,
        probes=rope_probes,
        global_functions=("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"),
    ),
]
