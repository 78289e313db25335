"""Rotary position embedding (Su et al., arXiv:2104.09864, eq. 34) of queries and keys in one launch.

The first R of a head's D elements form R / 2 pairs (a, b); pair i of the token at s turns by cos and sin at (s, i):

    a' = a cos_a - b sin_a        da = da' cos_a + db' sin_b
    b' = b cos_b + a sin_b        db = db' cos_b - da' sin_a        the transposed rotation

a's and b's own cos and sin may differ, so the backward takes the sin of the partner. Elements R to D pass through.

Shapes: q (B, Hq, S, D) and k (B, Hk, S, D) with ``unsqueeze_dim=1``, or (B, S, Hq, D) and (B, S, Hk, D) with 2; any
Hk, 0 included; cos, sin (B or 1, S, R), or (B or 1, S, R / 2) where the variant has one angle a pair.
Layouts: any strides with contiguous heads; q' and k' are laid out as ``torch.empty_like`` lays out q and k, so that
a (B, S, H, D) projection seen as (B, H, S, D) stays one.
Dtypes: float32, float16 and bfloat16; cos and sin may be of another one than q and k. q' has q's dtype, or what torch
promotes q's and cos's to where the variant says "promote". The kernel computes in float32 and rounds once, at the
store; ``reference`` rounds where the models do.

A program turns all heads of one token, which loads its cos and sin once. Nothing but cos and sin is saved.
Left out: gradients of cos and sin (the reference gives them); sections of several position axes (multimodal RoPE) are
joined into cos and sin by the caller; second derivatives (they raise).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth_kernels.cases.rope import cases, timings
from sloth_kernels.launch import Launcher, next_power_of_2, runs_triton, tl, triton
from sloth_kernels.op import Op
from sloth_kernels.rotations import ROTATIONS, VARIANTS, Rotation

TILE, NUM_WARPS = 2048, 4
"""Pairs a program turns at a time: 16 a thread, two 16-byte loads of each half in bfloat16."""


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, variant: str = "half", unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The models' own computation, equal to the bit up to float32; "upcast" stays in float64 there."""
    rotation = ROTATIONS[variant]
    cos, sin = (_spread(t, rotation).unsqueeze(unsqueeze_dim) for t in (cos, sin))
    return _rotate(q, cos, sin, rotation), _rotate(k, cos, sin, rotation)


def _spread(angles: Tensor, rotation: Rotation) -> Tensor:
    """One entry an element, (..., R)."""
    if rotation.angles == "element":
        return angles
    if rotation.angles == "first_half":
        angles = angles[..., : angles.shape[-1] // 2]
    return angles.repeat_interleave(2, -1) if rotation.pairs == "interleaved" else torch.cat((angles, angles), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if rotation.pairs == "deinterleaved":
        turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), -1)
    if rotation.math == "upcast":
        turned = turned.to(torch.promote_types(x.dtype, torch.float32))
    turned = turned * cos + _partner(turned, rotation) * sin
    if rotation.math != "promote":
        turned = turned.to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _partner(x: Tensor, rotation: Rotation) -> Tensor:
    """(-b, a) in the places of (a, b); (b, -a) clockwise."""
    if rotation.pairs == "interleaved":
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((b, -a) if rotation.clockwise else (-b, a), -1)


@triton.jit
def _load_pairs(ptr, rows, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Elements a and b (rows, BLOCK) of each pair, as float32."""
    if INTERLEAVED:
        i = tl.arange(0, 2 * BLOCK)
        x = tl.load(ptr + rows + i, mask=mask & (i < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
    else:
        i = tl.arange(0, BLOCK)
        a = tl.load(ptr + rows + i, mask=mask & (i < HALF), other=0.0)
        b = tl.load(ptr + rows + HALF + i, mask=mask & (i < HALF), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(ptr, rows, mask, a, b, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        i = tl.arange(0, 2 * BLOCK)
        tl.store(ptr + rows + i, tl.reshape(tl.join(a, b), [a.shape[0], 2 * BLOCK]), mask=mask & (i < 2 * HALF))
    else:
        i = tl.arange(0, BLOCK)
        tl.store(ptr + rows + i, a, mask=mask & (i < HALF))
        tl.store(ptr + rows + HALF + i, b, mask=mask & (i < HALF))


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, x_stride, y_stride, cos_a, cos_b, sin_a, sin_b,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    BLOCK_REST: tl.constexpr, FROM_INTERLEAVED: tl.constexpr, TO_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn ``HEADS`` heads of one token, a stride apart, ``BLOCK_HEADS`` at a time."""
    for start in tl.static_range(0, HEADS, BLOCK_HEADS):  # pyright: ignore[reportGeneralTypeIssues]
        heads = (start + tl.arange(0, BLOCK_HEADS))[:, None]
        mask = heads < HEADS
        x_rows = heads.to(tl.int64) * x_stride
        y_rows = heads.to(tl.int64) * y_stride
        a, b = _load_pairs(x_ptr, x_rows, mask, HALF, BLOCK, FROM_INTERLEAVED)
        if REST > 0:
            i = tl.arange(0, BLOCK_REST)
            rest = tl.load(x_ptr + x_rows + 2 * HALF + i, mask=mask & (i < REST), other=0.0)
            tl.store(y_ptr + y_rows + 2 * HALF + i, rest, mask=mask & (i < REST))
        turned_a = a * cos_a - b * sin_a
        turned_b = b * cos_b + a * sin_b
        _store_pairs(y_ptr, y_rows, mask, turned_a, turned_b, HALF, BLOCK, TO_INTERLEAVED)


@triton.jit
def _load_angles(ptr, A: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The entries of each pair's elements: STEP * i + A and STEP * i + B."""
    i = tl.arange(0, BLOCK)
    a = tl.load(ptr + STEP * i + A, mask=i < HALF, other=0.0).to(tl.float32)
    b = a
    if B != A:
        b = tl.load(ptr + STEP * i + B, mask=i < HALF, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@Launcher
@triton.jit(do_not_specialize=["seq"])
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, seq,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    q_out_batch, q_out_seq, q_out_head, k_out_batch, k_out_seq, k_out_head, angle_batch, angle_seq,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr,
    FROM_INTERLEAVED: tl.constexpr, TO_INTERLEAVED: tl.constexpr, CLOCKWISE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // seq).to(tl.int64)
    s = (tl.program_id(0) % seq).to(tl.int64)
    angle = b * angle_batch + s * angle_seq
    cos_a, cos_b = _load_angles(cos_ptr + angle, A, B, STEP, HALF, BLOCK)
    sin_a, sin_b = _load_angles(sin_ptr + angle, A, B, STEP, HALF, BLOCK)
    if TRANSPOSED:
        sin_a, sin_b = sin_b, sin_a
    if CLOCKWISE != TRANSPOSED:
        sin_a, sin_b = -sin_a, -sin_b
    _turn_heads(
        q_ptr + b * q_batch + s * q_seq,
        q_out_ptr + b * q_out_batch + s * q_out_seq,
        q_head, q_out_head, cos_a, cos_b, sin_a, sin_b,
        Q_HEADS, Q_BLOCK, HALF, BLOCK, REST, BLOCK_REST, FROM_INTERLEAVED, TO_INTERLEAVED,
    )  # fmt: skip
    _turn_heads(
        k_ptr + b * k_batch + s * k_seq,
        k_out_ptr + b * k_out_batch + s * k_out_seq,
        k_head, k_out_head, cos_a, cos_b, sin_a, sin_b,
        K_HEADS, K_BLOCK, HALF, BLOCK, REST, BLOCK_REST, FROM_INTERLEAVED, TO_INTERLEAVED,
    )  # fmt: skip


def _tokens_first(x: Tensor, unsqueeze_dim: int) -> tuple[Tensor, tuple[int, int, int]]:
    """``x`` with contiguous heads, and its strides along batch, token and head."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, first, second, _ = x.stride()
    return x, (batch, second, first) if unsqueeze_dim == 1 else (batch, first, second)


def _angle_layout(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos and sin with the same strides and contiguous rows, and their strides along batch and token."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


def _angle_entries(rotation: Rotation, half: int) -> dict[str, int]:
    """Where pair i finds the angles of its elements: entries STEP i + A and STEP i + B."""
    if rotation.angles != "element":
        return {"A": 0, "B": 0, "STEP": 1}
    return {"A": 0, "B": 1, "STEP": 2} if rotation.pairs == "interleaved" else {"A": 0, "B": half, "STEP": 1}


def _half(cos: Tensor, rotation: Rotation) -> int:
    """R / 2."""
    return cos.shape[-1] if rotation.angles == "pair" else cos.shape[-1] // 2


def _launch(
    heads: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor,
    variant: str, unsqueeze_dim: int, transposed: bool = False,
) -> None:  # fmt: skip
    """Turn ``heads`` (q, k) into ``out``, by the transposed rotation if so asked."""
    rotation = ROTATIONS[variant]
    half = _half(cos, rotation)
    block = next_power_of_2(half)
    (q, q_strides), (k, k_strides) = (_tokens_first(x, unsqueeze_dim) for x in heads)
    (q_out, q_out_strides), (k_out, k_out_strides) = (_tokens_first(x, unsqueeze_dim) for x in out)
    cos, sin, angle_batch, angle_seq = _angle_layout(cos, sin)
    seq, q_heads, k_heads = cos.shape[1], q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]
    most_heads, rest = max(1, TILE // block), q.shape[-1] - 2 * half
    _rope_kernel(
        (q.shape[0] * seq,),
        q, k, q_out, k_out, cos, sin, seq,
        *q_strides, *k_strides, *q_out_strides, *k_out_strides, angle_batch, angle_seq,
        Q_HEADS=q_heads, Q_BLOCK=min(most_heads, next_power_of_2(q_heads)),
        K_HEADS=k_heads, K_BLOCK=min(most_heads, next_power_of_2(k_heads)),
        HALF=half, BLOCK=block, REST=rest, BLOCK_REST=next_power_of_2(rest),
        **_angle_entries(rotation, half),
        FROM_INTERLEAVED=rotation.pairs == "interleaved" if transposed else rotation.pairs != "half",
        TO_INTERLEAVED=rotation.pairs != "half" if transposed else rotation.pairs == "interleaved",
        CLOCKWISE=rotation.clockwise, TRANSPOSED=transposed, num_warps=NUM_WARPS,
    )  # fmt: skip


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Laid out as ``x`` if that keeps heads contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, variant: str, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """Returns q' and k', laid out as q and k."""
    dtype = torch.promote_types(q.dtype, cos.dtype) if ROTATIONS[variant].math == "promote" else q.dtype
    q_out, k_out = _empty_like(q, dtype), _empty_like(k, dtype)
    _launch((q, k), (q_out, k_out), cos, sin, variant, unsqueeze_dim)
    return q_out, k_out


def backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, variant: str, unsqueeze_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k in ``dtype``, theirs, laid out as dq and dk."""
    out = _empty_like(dq, dtype), _empty_like(dk, dtype)
    backward_into((dq, dk), out, cos, sin, variant, unsqueeze_dim)
    return out


def backward_into(
    grads: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, variant: str, unsqueeze_dim: int
) -> None:
    """Write gradients of q and k to ``out``, in any layout whose heads are contiguous; ``grads`` are dq' and dk'."""
    _launch(grads, out, cos, sin, variant, unsqueeze_dim, transposed=True)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, variant: str, unsqueeze_dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.variant, ctx.unsqueeze_dim = variant, unsqueeze_dim
        q_out, k_out = forward(q, k, cos, sin, variant, unsqueeze_dim)
        # dq laid out as q: the projection's backward then views it as rows without a copy.
        ctx.dtype, ctx.strides = q.dtype, (q_out.stride(), k_out.stride())
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq_out: Tensor, dk_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = (
            torch.empty_strided(grad.shape, stride, dtype=ctx.dtype, device=grad.device)
            for grad, stride in zip((dq_out, dk_out), ctx.strides, strict=True)
        )
        backward_into((dq_out, dk_out), (dq, dk), cos, sin, ctx.variant, ctx.unsqueeze_dim)
        return dq, dk, None, None, None, None


def kernel_takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, variant: str, unsqueeze_dim: int = 1) -> bool:
    """Whether the shapes are the ones at the top of this file; torch's own errors and broadcasts cover the others."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or unsqueeze_dim not in (1, 2) or q.numel() == 0:
        return False
    rotation = ROTATIONS[variant]
    batch, seq, width = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[-1]
    return (
        (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[-1], k.dtype) == (batch, seq, width, q.dtype)
        and (sin.shape, sin.dtype) == (cos.shape, cos.dtype)
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == seq
        and 0 < 2 * _half(cos, rotation) <= width
        and (rotation.angles == "pair" or cos.shape[-1] % 2 == 0)
        and not (cos.requires_grad or sin.requires_grad)
        and runs_triton(q, k, cos, sin)
    )


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, variant: str = "half", unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their tokens' angles; the arguments are those of ``apply_rotary_pos_emb``.

    Raises ``ValueError`` for an unknown variant, torch's own errors for shapes that do not fit.
    """
    if variant not in ROTATIONS:
        raise ValueError(f"rope: unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    if not kernel_takes(q, k, cos, sin, variant, unsqueeze_dim):
        return reference(q, k, cos, sin, variant, unsqueeze_dim)
    return _Rope.apply(q, k, cos, sin, variant, unsqueeze_dim)


OP = Op(
    "rope",
    rope,
    reference,
    cases,
    timings,
    VARIANTS,
    # One rounding, to the nearest: an eighth of the spacing is left for float32's own errors on the way to it.
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3},
)
