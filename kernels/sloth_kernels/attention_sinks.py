"""Attention sinks (gpt-oss) around kernels that know of none.

A sink is one more key with score sink_h and value 0. With the log-sum-exp L that a kernel returns,

    L' = log(exp L + exp sink)      out' = exp(L - L') out      dsink = -Σ exp(sink - L') δ,  δ = Σ dout out'

are those of the row with its sink. The kernel's backward reads p' = exp(s - L') and δ from out' and L', so it is exact
as it is. Shapes: out (B, Hq, S, E), L (B, Hq, S), sinks (Hq,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_sinks(out: Tensor, extras: tuple[Any, ...], sinks: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """out' and L'; a kernel's L may have more rows than out, or a last dimension of 1."""
    lse = extras[0].reshape(*out.shape[:2], -1)
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.exp(lse - with_sink)[..., : out.shape[2]]
    return out.mul_(share.unsqueeze(-1)), (with_sink.view(extras[0].shape), *extras[1:])


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """dsinks (Hq,), from the ``out`` and L' of ``add_sinks``."""
    lse = lse.reshape(*out.shape[:2], -1)[..., : out.shape[2]]
    delta = (dout.to(lse.dtype) * out).sum(-1)
    return torch.exp(sinks.to(lse.dtype)[:, None] - lse).mul_(delta).sum((0, 2)).neg_().to(sinks.dtype)
