"""Gated linear unit (Shazeer, arXiv:2002.05202): the activation of one half times the other.

    y = act(g) u        dg = dy u act'(g)        du = dy act(g)
    silu       act(g) = g σ(g)                   act'(g) = σ(g) (1 + g (1 - σ(g)))
    gelu       act(g) = g Φ(g)                   act'(g) = Φ(g) + g exp(-g²/2) / √(2π)
    gelu_tanh  act(g) = g σ(2z)                  act'(g) = σ(2z) (1 + 2 g z' (1 - σ(2z)))
               z = √(2/π) (g + 0.044715 g³), as (1 + tanh z) / 2 = σ(2z) (Hendrycks and Gimpel, arXiv:1606.08415)

Shapes: gate, up, y (..., I), taken as T rows of I. Rows may be farther apart than I, as those of the halves of one
(T, 2I) product are; any other layout is copied first. y and both gradients are contiguous.
Dtypes: float32, float16 and bfloat16, the same for gate and up. The kernels compute in float32 and round once, at the
store; ``reference`` rounds after the activation too, as the models do.

The backward recomputes the activation from gate and up: nothing else is saved.
Left out: clamped and scaled units (gpt-oss); ReLU² and other ungated ones; second derivatives (they raise).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sloth_kernels.launch import Launcher, cdiv, next_power_of_2, row_strides, runs_triton, tl, triton
from sloth_kernels.op import Call, Case, Op, Timing

VARIANTS = ("silu", "gelu", "gelu_tanh")
"""``silu``: SwiGLU (Llama, Mistral, Qwen); ``gelu``: GeGLU, exact; ``gelu_tanh``: GeGLU by tanh (Gemma)."""

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}

BLOCK_I = 2048
"""Columns of a program: with 4 warps 16 elements a thread, two 16-byte loads of each input in bfloat16."""


def reference(gate: torch.Tensor, up: torch.Tensor, variant: str = "silu") -> torch.Tensor:
    """The models' own computation, equal to the bit in every dtype."""
    return _ACTIVATIONS[variant](gate) * up


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)). As the square of a root: a division takes five instructions more, which ``glu_contractions``
    has no time for."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def activation(g, VARIANT: tl.constexpr):
    """Returns act(g) and act'(g)."""
    if VARIANT == "silu":
        s = _sigmoid(g)
        slope = s * (1.0 + g * (1.0 - s))
    elif VARIANT == "gelu":
        s = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        g2 = g * g
        s = _sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g2))
        slope = s * (1.0 + g * 1.5957691216057308 * (1.0 + 0.134145 * g2) * (1.0 - s))
    return g * s, slope


@triton.jit
def _place(cols, blocks, BLOCK: tl.constexpr):
    """This program's row, first column and mask."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return row, start, start + tl.arange(0, BLOCK) < cols


@Launcher
@triton.jit
def _glu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, cols, blocks, gate_stride, up_stride, y_stride,
    VARIANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, mask = _place(cols, blocks, BLOCK)
    i = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + start + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + start + i, mask=mask, other=0.0).to(tl.float32)
    act, _ = activation(gate, VARIANT)
    tl.store(y_ptr + row * y_stride + start + i, act * up, mask=mask)


@Launcher
@triton.jit
def _glu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, cols, blocks, dy_stride, gate_stride, up_stride,
    VARIANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, mask = _place(cols, blocks, BLOCK)
    i = tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + start + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + start + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + start + i, mask=mask, other=0.0).to(tl.float32)
    act, slope = activation(gate, VARIANT)
    tl.store(dgate_ptr + row * cols + start + i, dy * up * slope, mask=mask)
    tl.store(dup_ptr + row * cols + start + i, dy * act, mask=mask)


@Launcher
@triton.jit
def _glu_low_rank_backward_kernel(
    dy_ptr, u_ptr, A_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, cols, blocks, rank,
    dy_stride, u_stride, A_stride, gate_stride, up_stride,
    VARIANT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Programs that start together lie side by side in rows, so that pages of memory are read whole.
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.arange(0, BLOCK_R)
    t_wide = t.to(tl.int64)[:, None]
    mask = (t < rows)[:, None] & (i < cols)[None, :]
    u = tl.load(u_ptr + t_wide * u_stride + r[None, :], mask=(t < rows)[:, None] & (r < rank)[None, :], other=0.0)
    A = tl.load(A_ptr + r[:, None] * A_stride + i[None, :], mask=(r < rank)[:, None] & (i < cols)[None, :], other=0.0)
    dy = tl.load(dy_ptr + t_wide * dy_stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.dot(u, A, dy, input_precision="ieee")
    gate = tl.load(gate_ptr + t_wide * gate_stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + t_wide * up_stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    act, slope = activation(gate, VARIANT)
    out = t_wide * cols + i[None, :]
    tl.store(dgate_ptr + out, dy * up * slope, mask=mask)
    tl.store(dup_ptr + out, dy * act, mask=mask)


def _rows(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[int], int]:
    """The tensors as the kernels can walk them, their row strides and the row's width: contiguous ones are one row."""
    if all(t.is_contiguous() for t in tensors):
        cols = tensors[0].numel()
        return list(tensors), [cols] * len(tensors), cols
    walked = [row_strides(t) for t in tensors]
    return [t for t, _, _ in walked], [stride for _, stride, _ in walked], tensors[0].shape[-1]


def _grid(n: int, cols: int) -> tuple[tuple[int], int, int, int]:
    """Grid, blocks a row, block size and warps for ``n`` elements in rows of ``cols``."""
    block = min(BLOCK_I, next_power_of_2(cols))
    blocks = cdiv(cols, block)
    return (n // cols * blocks,), blocks, block, max(1, block // 512)


def forward(gate: torch.Tensor, up: torch.Tensor, variant: str, room: int = 0) -> torch.Tensor:
    """Returns y (..., I); behind each of its rows ``room`` elements are left free."""
    width = gate.shape[-1]
    y = torch.empty(*gate.shape[:-1], width + room, dtype=gate.dtype, device=gate.device)
    y = y[..., :width] if room else y
    (gate, up, _), strides, cols = _rows(gate, up, y)
    grid, blocks, block, num_warps = _grid(y.numel(), cols)
    _glu_forward_kernel(grid, gate, up, y, cols, blocks, *strides, VARIANT=variant, BLOCK=block, num_warps=num_warps)
    return y


def results_of(gate: torch.Tensor, up: torch.Tensor, overwrite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where dgate and dup go: each element is read before it is written, by the same thread."""
    if overwrite and gate.is_contiguous() and up.is_contiguous():
        return gate, up
    shape, dtype, device = gate.shape, gate.dtype, gate.device
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, variant: str, overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dgate and dup (..., I), contiguous; with ``overwrite`` in the memory of contiguous gate and up."""
    dgate, dup = results_of(gate, up, overwrite)
    (dy, gate, up), strides, cols = _rows(dy, gate, up)
    grid, blocks, block, num_warps = _grid(dup.numel(), cols)
    _glu_backward_kernel(
        grid, dy, gate, up, dgate, dup, cols, blocks, *strides, VARIANT=variant, BLOCK=block, num_warps=num_warps
    )
    return dgate, dup


def kernel_takes(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether ``forward`` and ``backward`` can run on these; ``reference`` takes all others."""
    return gate.shape == up.shape and gate.dtype == up.dtype and gate.numel() > 0 and runs_triton(gate, up)


LOW_RANK_TILE = (32, 64, 4)
"""Rows, columns and warps of a program of ``low_rank_backward``."""
MAX_RANK = 256


def low_rank_backward(
    dy: torch.Tensor,
    u_TR: torch.Tensor,
    A_RI: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    variant: str,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``backward`` for the gradient ``dy + u A``, which is never written down: dgate and dup (..., I), contiguous.

    ``dy`` (T, I) and ``u_TR`` (T, R) have contiguous rows, ``A_RI`` (R, I) too; R is at most ``MAX_RANK``.
    """
    dgate, dup = results_of(gate, up, overwrite)
    gate, gate_stride, _ = row_strides(gate)
    up, up_stride, _ = row_strides(up)
    (rows, cols), rank = dy.shape, u_TR.shape[1]
    block_t, block_i, num_warps = LOW_RANK_TILE
    blocks = cdiv(cols, block_i)
    _glu_low_rank_backward_kernel(
        (blocks * cdiv(rows, block_t),),
        dy, u_TR, A_RI, gate, up, dgate, dup, rows, cols, blocks, rank,
        dy.stride(0), u_TR.stride(0), A_RI.stride(0), gate_stride, up_stride,
        VARIANT=variant, BLOCK_T=block_t, BLOCK_I=block_i, BLOCK_R=max(16, next_power_of_2(rank)),
        num_warps=num_warps,
    )  # fmt: skip
    return dgate, dup


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, variant: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.variant = variant
        return forward(gate, up, variant)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *backward(dy, gate, up, ctx.variant), None


def glu(gate: torch.Tensor, up: torch.Tensor, variant: str = "silu") -> torch.Tensor:
    """``act(gate) * up`` for gate and up of one shape (..., I).

    Raises ``ValueError`` for an unknown variant. Shapes or dtypes that differ take the reference, which broadcasts and
    promotes as torch does.
    """
    if variant not in _ACTIVATIONS:
        raise ValueError(f"glu: unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    if not kernel_takes(gate, up):
        return reference(gate, up, variant)
    return _GLU.apply(gate, up, variant)


def _case(shape: tuple[int, ...], variant: str, layout: str = "contiguous") -> Case:
    """``layout``: contiguous, halves of one tensor, one of them padded, or transposed."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(2).requires_grad_()

        if layout == "halves":
            gate, up = randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
        elif layout == "padded":
            gate, up = randn(*shape[:-1], shape[-1] + 3)[..., 3:], randn(*shape)
        elif layout == "transposed":
            gate, up = randn(*reversed(shape)).permute(*reversed(range(len(shape)))), randn(*shape)
        else:
            gate, up = randn(*shape), randn(*shape)
        return (gate, up), {"variant": variant}

    return Case(f"{variant}-{layout}-{'x'.join(map(str, shape))}", make)


def cases() -> Sequence[Case]:
    """Odd and non-power-of-two widths, one element, more than one block a row, each layout."""
    return [
        *(_case((3, 5, 123), variant) for variant in VARIANTS),
        *(_case((2, 7, 80), variant, "halves") for variant in VARIANTS),
        _case((1, 1), "silu"),
        _case((3, 2064), "silu", "halves"),
        _case((3, 3001), "gelu_tanh"),
        _case((5, 33), "silu", "padded"),
        _case((4, 6, 10), "gelu", "transposed"),
    ]


def _timing(tokens: int, width: int, variant: str, layout: str) -> Timing:
    bytes_each = 2 * tokens * width
    return Timing(_case((tokens, width), variant, layout), bytes_forward=3 * bytes_each, bytes_backward=5 * bytes_each)


def timings() -> Sequence[Timing]:
    """Llama 8B's MLP at 16,384 tokens: each variant, and silu on the halves of a fused gate and up product."""
    return [
        *(_timing(16384, 14336, variant, "contiguous") for variant in VARIANTS),
        _timing(16384, 14336, "silu", "halves"),
    ]


OP = Op(
    "glu",
    glu,
    reference,
    cases,
    timings,
    VARIANTS,
    # One rounding, to the nearest: an eighth of the spacing is left for float32's own errors on the way to it.
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3},
)
