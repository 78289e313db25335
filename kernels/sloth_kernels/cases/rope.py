"""The calls that test and time ``ops/rope.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sloth_kernels.op import Call, Case, Timing
from sloth_kernels.rotations import ROTATIONS, VARIANTS


def _case(
    variant: str,
    batch: int = 2,
    seq: int = 3,
    heads: tuple[int, int] = (3, 1),
    width: int = 20,
    rotated: int = 20,
    layout: str = "projection",
    angles: str = "batch",
) -> Case:
    """``layout`` of q and k: "projection" (B, S, H, D) seen as (B, H, S, D), the same "untransposed", contiguous
    "heads" first, or slices of one "fused" projection. ``angles``: "batch", "shared" by it, "float32" and shared, or
    a "table" as models make it: shared, cos and sin of one angle, both halves equal.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        if layout == "heads":
            q, k = (randn(batch, n, seq, width).requires_grad_() for n in heads)
        elif layout == "fused":
            q, k = randn(batch, seq, sum(heads) + 1, width).requires_grad_()[:, :, : sum(heads)].split(heads, 2)
        else:
            q, k = (randn(batch, seq, n, width).requires_grad_() for n in heads)
        if layout in ("projection", "fused"):
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        angle_dtype = torch.promote_types(dtype, torch.float32) if angles == "float32" else dtype
        entries = rotated // 2 if ROTATIONS[variant].angles == "pair" else rotated
        # Not cos and sin of one angle: a rotation that swaps or drops an entry shows.
        cos, sin = (randn(batch if angles == "batch" else 1, seq, entries, dtype=angle_dtype) for _ in range(2))
        if angles == "table":
            turn = cos[..., : entries // 2].repeat(1, 1, 2)
            cos, sin = turn.cos(), turn.sin()
        return (q, k, cos, sin), {"variant": variant, "unsqueeze_dim": 2 if layout == "untransposed" else 1}

    shape = f"{batch}x{seq}x{heads[0]}+{heads[1]}x{width}"
    return Case(f"{variant}-{layout}-{angles}-{shape}-rotated{rotated}", make)


def cases() -> Sequence[Case]:
    """Every variant; partial rotation, odd head counts, several blocks of heads, each layout, each kind of angles."""
    return [
        *(_case(variant) for variant in VARIANTS),
        *(
            _case(variant, width=24, rotated=12, layout="untransposed")
            for variant in ("half", "interleaved_first_half")
        ),
        *(_case(variant, angles="float32") for variant in ("half", "half_cast", "half_upcast", "interleaved_upcast")),
        _case("half", layout="heads", angles="shared"),
        _case("half", heads=(6, 2), layout="fused", width=16, rotated=16),
        _case("deinterleaved_first_half", heads=(5, 1), layout="fused", width=8, rotated=8),
        _case("half", heads=(2, 0)),
        _case("half", batch=1, seq=1, heads=(1, 1), width=2, rotated=2),
        _case("half", batch=1, seq=2, heads=(18, 3), width=260, rotated=258),
    ]


def _timing(variant: str, batch: int, seq: int, rotated: int = 128, layout: str = "projection") -> Timing:
    heads, width, tokens = (32, 8), 128, batch * seq
    moved = 2 * 2 * tokens * sum(heads) * width + 2 * 2 * seq * rotated
    case = _case(variant, batch, seq, heads, width, rotated, layout, "table")
    return Timing(case, bytes_forward=moved, bytes_backward=moved)


def timings() -> Sequence[Timing]:
    """Llama 8B's 32 + 8 heads of 128 at 16,384 tokens; interleaved, partial and heads-first ones of the same size."""
    return [
        _timing("half", 8, 2048),
        _timing("half", 1, 16384),
        _timing("interleaved_first_half", 8, 2048),
        _timing("half", 8, 2048, rotated=96),
        _timing("half", 8, 2048, layout="heads"),
    ]
