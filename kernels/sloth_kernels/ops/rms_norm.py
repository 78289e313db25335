"""Root mean square normalisation (Zhang and Sennrich, arXiv:1910.07467), with the cast orders models use.

    r = rsqrt(mean_H(x²) + eps)        x̂ = r x                      in float32
    y = w x̂                            or (1 + w) x̂: ``scale_cast_plus_one``
    g = w dy      dx = r (g - x̂ mean_H(g x̂))      dw = Σ_T dy x̂

Shapes: x, y, dx (..., H), taken as T rows of H; w, dw (H,) or no weight at all. Rows may have two strides, as those of
a (B, S, heads, D) slice of a fused projection have; any other layout is copied first. y and dx are contiguous.
Dtypes: float32, float16 and bfloat16. y has x's dtype, but for ``cast_scale`` what torch promotes x's and w's to.
The kernels compute in float32 and round once, at the store; ``reference`` rounds where the models do.

dw is a sum of fixed order: each program adds up the rows it walks, a second kernel adds up the programs. A frozen
weight costs no sum, and its backward is one launch.
Left out: H above ``MAX_HIDDEN`` (a row must fit one program's registers) takes the reference; bias, gates and grouped
norms; second derivatives (they raise).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sloth_kernels.launch import (
    Launcher,
    cdiv,
    inner_rows,
    multiprocessors,
    next_power_of_2,
    row_strides,
    runs_triton,
    tl,
    triton,
)
from sloth_kernels.op import Call, Case, Op, Timing

VARIANTS = ("cast_scale", "scale_cast", "scale_cast_plus_one")
"""``cast_scale``: w * x̂.to(x.dtype) (Llama, Mistral, Qwen, Phi-3, Granite, T5); ``scale_cast``: (w * x̂).to(x.dtype)
(OLMo 2, gpt-oss, Gemma 3n); ``scale_cast_plus_one``: ((1 + w) * x̂).to(x.dtype) (Gemma 1 to 3, Qwen3-Next)."""

MAX_HIDDEN = 16384
WARPS_PER_SM, STAGES = 16, 3
"""Of the persistent grid that sums dw: few enough programs for a short second sum, with two tiles' loads each ahead."""


def reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, variant: str = "cast_scale") -> torch.Tensor:
    """The models' own computation, equal to the bit up to float32; in float64 all of it is done in float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return x_hat.to(x.dtype)
    if variant == "cast_scale":
        return weight * x_hat.to(x.dtype)
    scale = weight.to(wide.dtype)
    return (x_hat * (1.0 + scale if variant == "scale_cast_plus_one" else scale)).to(x.dtype)


@triton.jit
def _row_offsets(rows, inner, outer_stride, inner_stride):
    rows = rows.to(tl.int64)
    return rows // inner * outer_stride + rows % inner * inner_stride


@triton.jit
def _scale(w_ptr, cols, mask, HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr):
    scale = tl.full(cols.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if PLUS_ONE:
            scale += 1.0
    return scale


@Launcher
@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_forward_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, n_rows, inner, x_outer, x_inner, y_stride, eps, H: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_H)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (rows < n_rows)[:, None] & (cols < H)[None, :]
    x_offsets = _row_offsets(rows, inner, x_outer, x_inner)[:, None] + cols[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(w_ptr, cols, cols < H, HAS_WEIGHT, PLUS_ONE)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    y = x * rstd[:, None] * scale[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * y_stride + cols[None, :], y, mask=mask)


@Launcher
@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, partial_ptr, add_ptr,
    n_rows, inner, dy_outer, dy_inner, x_outer, x_inner,
    H: tl.constexpr, HAS_WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, SUM_DW: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_H)
    scale = _scale(w_ptr, cols, cols < H, HAS_WEIGHT, PLUS_ONE)
    dw = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_T), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (rows < n_rows)[:, None] & (cols < H)[None, :]
        x_offsets = _row_offsets(rows, inner, x_outer, x_inner)[:, None] + cols[None, :]
        dy_offsets = _row_offsets(rows, inner, dy_outer, dy_inner)[:, None] + cols[None, :]
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        x_hat = x * rstd
        g = dy * scale[None, :]
        dx = (g - x_hat * (tl.sum(g * x_hat, 1) / H)[:, None]) * rstd
        dx_offsets = rows.to(tl.int64)[:, None] * H + cols[None, :]
        if ADD:
            dx += tl.load(add_ptr + dx_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dx_offsets, dx, mask=mask)
        if SUM_DW:
            dw += dy * x_hat
    if SUM_DW:
        tl.store(partial_ptr + tl.program_id(0) * H + cols, tl.sum(dw, 0), mask=cols < H)


@Launcher
@triton.jit(do_not_specialize=["n_partials"])
def _rms_norm_sum_partials_kernel(
    partial_ptr, dw_ptr, n_partials, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < n_partials)[:, None] & (cols < H)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * H + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, 0), mask=cols < H)


@lru_cache
def _tile(hidden: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile and its warps: 16 elements a thread, two 16-byte loads each in bfloat16."""
    block_h = next_power_of_2(hidden)
    block_t = max(1, 2048 // block_h)
    return block_t, block_h, min(32, max(1, block_t * block_h // 512))


def _output_dtype(x: torch.Tensor, weight: torch.Tensor | None, variant: str) -> torch.dtype:
    if weight is None or weight.dtype == x.dtype or variant != "cast_scale":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, variant: str, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, x as the kernel could walk it (a copy for odd layouts) and 1 / rms of each row (T,), float32.

    Behind each row of y ``room`` elements are left free.
    """
    hidden = x.shape[-1]
    n_rows = x.numel() // hidden
    block_t, block_h, num_warps = _tile(hidden)
    inner = inner_rows(x)
    x, x_outer, x_inner = row_strides(x, inner)
    y = torch.empty(*x.shape[:-1], hidden + room, dtype=_output_dtype(x, weight, variant), device=x.device)
    y = y[..., :hidden] if room else y
    rstd_T = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    _rms_norm_forward_kernel(
        (cdiv(n_rows, block_t),),
        x, weight, y, rstd_T, n_rows, inner, x_outer, x_inner, hidden + room, eps,
        H=hidden,
        HAS_WEIGHT=weight is not None,
        PLUS_ONE=variant == "scale_cast_plus_one",
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=num_warps,
    )  # fmt: skip
    return y, x, rstd_T


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd_T: torch.Tensor,
    variant: str,
    sum_dw: bool,
    add: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns dx, plus ``add`` (..., H) where it is given, and, with ``sum_dw``, dw in weight's dtype."""
    hidden = x.shape[-1]
    block_t, block_h, num_warps = _tile(hidden)
    programs = cdiv(rstd_T.numel(), block_t)
    partial_PH = None
    if sum_dw:
        programs = min(programs, multiprocessors(x.device) * max(1, WARPS_PER_SM // num_warps))
        partial_PH = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    inner = inner_rows(x, dy)
    x, x_outer, x_inner = row_strides(x, inner)
    dy, dy_outer, dy_inner = row_strides(dy, inner)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_backward_kernel(
        (programs,),
        dy, x, weight, rstd_T, dx, partial_PH, None if add is None else add.contiguous(),
        rstd_T.numel(), inner, dy_outer, dy_inner, x_outer, x_inner,
        H=hidden,
        HAS_WEIGHT=weight is not None,
        PLUS_ONE=variant == "scale_cast_plus_one",
        SUM_DW=sum_dw,
        ADD=add is not None,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        STAGES=STAGES if sum_dw else 1,
        num_warps=num_warps,
    )  # fmt: skip
    return dx, _sum_partials(partial_PH, weight)


def _sum_partials(partial_PH: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor | None:
    if partial_PH is None or weight is None:
        return None
    n_partials, hidden = partial_PH.shape
    dw = torch.empty_like(weight)
    _rms_norm_sum_partials_kernel(
        (cdiv(hidden, 32),), partial_PH, dw, n_partials, H=hidden, BLOCK_P=64, BLOCK_H=32, num_warps=4
    )
    return dw


def kernel_takes(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether ``forward`` and ``backward`` can run on these; ``reference`` takes all others."""
    return x.numel() > 0 and x.shape[-1] <= MAX_HIDDEN and runs_triton(*((x,) if weight is None else (x, weight)))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, variant: str) -> torch.Tensor:
        y, x, rstd_T = forward(x, weight, eps, variant)
        ctx.save_for_backward(x, weight, rstd_T)
        ctx.variant = variant
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd_T = ctx.saved_tensors
        dx, dw = backward(dy, x, weight, rstd_T, ctx.variant, ctx.needs_input_grad[1])
        return dx, dw, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, variant: str = "cast_scale") -> torch.Tensor:
    """Normalise the rows of ``x`` (..., H) by their root mean square and scale them by ``weight`` (H,) if there is one.

    Raises ``ValueError`` for an unknown variant and for a weight that is not as wide as x.
    """
    if variant not in VARIANTS:
        raise ValueError(f"rms_norm: unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs {tuple(x.shape[-1:])}"
        )
    if not kernel_takes(x, weight):
        return reference(x, weight, eps, variant)
    return _RMSNorm.apply(x, weight, eps, variant)


def _case(shape: tuple[int, ...], variant: str, layout: str = "contiguous", weight: str = "trained") -> Case:
    """``layout``: contiguous, a slice of wider rows, or heads out of a fused projection. ``weight``: trained, frozen,
    float32 (whatever x's dtype) or none."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)
        wide = (*shape[:-1], 3 * shape[-1]) if layout == "slice" else shape
        if layout == "heads":
            wide = (*shape[:-2], 2 * shape[-2], shape[-1])
        x = torch.randn(wide, dtype=dtype, device=device, generator=generator)
        if layout == "slice":
            x = x[..., shape[-1] : 2 * shape[-1]]
        if layout == "heads":
            x = x[..., : shape[-2], :]
        w = None
        if weight != "none":
            w_dtype = torch.promote_types(dtype, torch.float32) if weight == "float32" else dtype
            w = torch.randn(shape[-1], dtype=w_dtype, device=device, generator=generator)
            w.requires_grad_(weight != "frozen")
        return (x.requires_grad_(), w, 1e-5), {"variant": variant}

    return Case(f"{variant}-{layout}-{weight}-{'x'.join(map(str, shape))}", make)


def cases() -> Sequence[Case]:
    """Odd and non-power-of-two widths, one row, many short rows, each layout, each kind of weight."""
    plain = [_case((2, 9, hidden), variant) for variant in VARIANTS for hidden in (64, 123)]
    return [
        *plain,
        _case((1, 7), "cast_scale"),
        _case((37, 2, 16), "cast_scale"),
        _case((3, 5, 507), "cast_scale", weight="frozen"),
        _case((3, 5, 96), "scale_cast", weight="none"),
        _case((5, 80), "cast_scale", weight="float32"),
        _case((5, 80), "scale_cast", weight="float32"),
        _case((2, 7, 48), "cast_scale", layout="slice"),
        _case((2, 3, 3, 40), "scale_cast_plus_one", layout="heads"),
        _case((2, 2064), "cast_scale"),
    ]


def _timing(shape: tuple[int, ...], variant: str, layout: str, weight: str) -> Timing:
    bytes_x = 2 * torch.Size(shape).numel()
    return Timing(_case(shape, variant, layout, weight), bytes_forward=2 * bytes_x, bytes_backward=3 * bytes_x)


def timings() -> Sequence[Timing]:
    """Llama 8B's residual stream, frozen and trained, Gemma's cast, and Qwen3's QK-norm (32 heads of 128)."""
    return [
        _timing((16384, 4096), "cast_scale", "contiguous", "frozen"),
        _timing((16384, 4096), "cast_scale", "contiguous", "trained"),
        _timing((16384, 4096), "scale_cast_plus_one", "contiguous", "trained"),
        _timing((16384, 32, 128), "cast_scale", "contiguous", "trained"),
        _timing((16384, 32, 128), "cast_scale", "heads", "frozen"),
    ]


OP = Op(
    "rms_norm",
    rms_norm,
    reference,
    cases,
    timings,
    VARIANTS,
    # One rounding, to the nearest: an eighth of the spacing is left for float32's own errors on the way to it.
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3},
)
