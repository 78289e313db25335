"""Dequantisation of blockwise 4-bit weights (QLoRA: Dettmers et al., arXiv:2305.14314), equal to the bit to
bitsandbytes' ``dequantize_4bit``.

    a_b = absmax_b                                               plain
    a_b = nested_code[absmax_b] nested_absmax[b // m] + offset   double-quantised, m = nested_blocksize
    w_i = code[q_i] a_b,  b = i // blocksize                     products in float32, one rounding to the result's dtype

The product and the sum of a_b round separately: fused into one they would differ from bitsandbytes in the last bit.
Zeros may differ in sign where a code holds two zeros (FP4).

Layout: the weights in row-major order, two to a byte, the first in the high four bits; ``code`` is a table of 16
float32 values, so NF4, FP4 and any other 4-bit type are the same to the kernel. It is one launch: each thread turns
four packed bytes into eight weights, stored as 16 bytes at a time in 16-bit dtypes; the table of 64 bytes stays in L1,
and absmax is worked out once for each four bytes. Rows may be written apart, for others to lie behind them.
Left out: a gradient (4-bit weights are frozen). Blocks that are no multiple of 8, absmax in another dtype than float32
or uint8, and 2³¹ weights or more (bitsandbytes cannot quantise those) take the reference.

Shapes: N weights in B = ceil(N / blocksize) blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sloth_kernels.launch import Launcher, cdiv, runs_triton, tl, triton
from sloth_kernels.op import Call, Case, Op, Timing

WORDS, WARPS = 512, 8
"""Groups of four packed bytes a program takes, two to a thread: few enough registers for every thread of the GPU."""


class Quantized4bit(NamedTuple):
    """A 4-bit weight as plain tensors on one device; ``dequantize_4bit(*quantized, dtype=...)`` gives it back."""

    packed: torch.Tensor
    """ceil(N / 2) bytes in any shape and dtype (``quant_storage``), contiguous."""
    absmax: torch.Tensor
    """(B,) float32, or uint8 indices into ``nested_code``."""
    code: torch.Tensor
    """(16,) float32: the value of each 4-bit code for absmax 1."""
    shape: Sequence[int]
    """Of the weight; its product is N."""
    blocksize: int
    """Weights that share an absmax."""
    nested_absmax: torch.Tensor | None = None
    """(ceil(B / nested_blocksize),) float32; None where absmax is not quantised itself."""
    nested_code: torch.Tensor | None = None
    """(256,) float32."""
    offset: torch.Tensor | None = None
    """One float32: what was taken off every absmax before it was quantised."""
    nested_blocksize: int = 256
    """Absmax values that share a nested absmax."""


def reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: Sequence[int],
    blocksize: int,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    *,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The truth, as bitsandbytes computes it on any device."""
    n_weights = math.prod(shape)
    if nested_absmax is not None and nested_code is not None and offset is not None:
        scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
        absmax = nested_code[absmax.flatten().int()] * scale + offset
    bytes_ = packed.view(torch.uint8).flatten()
    indices = torch.stack((bytes_ >> 4, bytes_ & 15), -1).flatten()[:n_weights].int()
    weight = code[indices] * absmax.flatten().repeat_interleave(blocksize)[:n_weights]
    weight = weight.to(dtype).reshape(tuple(shape))
    return weight if out is None else out.copy_(weight)


@Launcher
@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, n_bytes, n_weights,
    row_stride, WORDS_PER_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WORDS_PER_ROW: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_W
    words = tl.arange(0, BLOCK_W)
    # The hint gives each thread four bytes at a time, hence the eight weights of one 16-byte store.
    bytes_ = tl.max_contiguous(tl.arange(0, 4 * BLOCK_W), 4)
    bytes_left = n_bytes - first * 4
    packed = tl.load(packed_ptr + first * 4 + bytes_, mask=bytes_ < bytes_left, other=0).to(tl.uint32)
    block = (first + words).to(tl.uint32) // WORDS_PER_BLOCK
    live = words * 4 < bytes_left
    absmax = tl.load(absmax_ptr + block, mask=live, other=0)
    if NESTED_BLOCK > 0:
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=live, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.uint32)) * scale + tl.load(offset_ptr)
    pairs = tl.join(tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15)))
    weights = (tl.reshape(pairs, [BLOCK_W, 8]) * absmax[:, None]).to(out_ptr.dtype.element_ty)
    if WORDS_PER_ROW > 0:
        row = (first + words) // WORDS_PER_ROW
        at = row * row_stride + (first + words - row * WORDS_PER_ROW) * 8
        tl.store(out_ptr + at[:, None] + tl.arange(0, 8)[None, :], weights, mask=live[:, None])
    else:
        cols = tl.arange(0, 8 * BLOCK_W)
        flat = tl.reshape(weights, [8 * BLOCK_W])
        tl.store(out_ptr + first * 8 + cols, flat, mask=cols < n_weights - first * 8)


def forward(quantized: Quantized4bit, out: torch.Tensor) -> torch.Tensor:
    """Write the weight to ``out``, of its shape and contiguous, or with rows that are contiguous and lie apart.

    Checks nothing that ``check`` does.
    """
    if out.numel() == 0:
        return out
    row_stride = 0 if out.is_contiguous() else out.stride(0)
    if not _kernel_takes(quantized, out, row_stride) or not runs_triton(out, quantized.code):
        return reference(*quantized, dtype=out.dtype, out=out)
    packed = quantized.packed.view(torch.uint8)
    _dequantize_kernel(
        (cdiv(packed.numel(), 4 * WORDS),),
        packed,
        quantized.absmax,
        quantized.code,
        quantized.nested_absmax,
        quantized.nested_code,
        quantized.offset,
        out,
        packed.numel(),
        out.numel(),
        row_stride,
        WORDS_PER_BLOCK=quantized.blocksize // 8,
        NESTED_BLOCK=0 if quantized.nested_absmax is None else quantized.nested_blocksize,
        WORDS_PER_ROW=out.shape[-1] // 8 if row_stride else 0,
        BLOCK_W=WORDS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out


def _kernel_takes(quantized: Quantized4bit, out: torch.Tensor, row_stride: int) -> bool:
    """Whether a thread's eight weights share an absmax, lie side by side and are stored at once."""
    absmax_dtype = torch.float32 if quantized.nested_absmax is None else torch.uint8
    if quantized.blocksize % 8 or quantized.absmax.dtype != absmax_dtype:
        return False
    if not row_stride:
        return out.numel() < 2**31
    return out.dim() == 2 and not out.shape[1] % 8 and not row_stride % 8 and out.shape[0] * row_stride < 2**31


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: Sequence[int],
    blocksize: int,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    *,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of ``shape`` in ``dtype``, written to ``out`` where that is given; see ``Quantized4bit``.

    Raises ``ValueError`` for tensors whose sizes or devices do not fit together, for an ``out`` of another shape, dtype
    or layout, and for an incomplete nested quantisation.
    """
    quantized = Quantized4bit(
        packed, absmax, code, shape, blocksize, nested_absmax, nested_code, offset, nested_blocksize
    )
    check(quantized)
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    elif out.shape != tuple(shape) or out.dtype != dtype or out.device != packed.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {dtype}, on {packed.device} and of shape {tuple(shape)}; "
            f"got {out.dtype} on {out.device} of shape {tuple(out.shape)} with strides {out.stride()}"
        )
    return forward(quantized, out)


def check(quantized: Quantized4bit) -> None:
    """Raise ``ValueError`` unless every tensor has the size and the device that the kernel relies on."""
    n_weights = math.prod(quantized.shape)
    if quantized.blocksize < 1 or quantized.nested_blocksize < 1:
        raise ValueError(f"blocks need a weight, got sizes {quantized.blocksize} and {quantized.nested_blocksize}")
    n_blocks = cdiv(n_weights, quantized.blocksize)
    sizes = {"packed": cdiv(n_weights, 2), "absmax": n_blocks, "code": 16}
    if quantized.nested_absmax is not None:
        n_nested = cdiv(n_blocks, quantized.nested_blocksize)
        sizes |= {"nested_absmax": n_nested, "nested_code": 256, "offset": 1}
    for name, size in sizes.items():
        tensor = getattr(quantized, name)
        if tensor is None:
            raise ValueError(f"nested_absmax also needs {name}; give all of the nested quantisation or none")
        got = tensor.nbytes if name == "packed" else tensor.numel()
        if got != size or tensor.device != quantized.packed.device or not tensor.is_contiguous():
            unit = "bytes" if name == "packed" else "values"
            raise ValueError(
                f"shape {tuple(quantized.shape)} in blocks of {quantized.blocksize} needs {size} contiguous {unit} of "
                f"{name} on {quantized.packed.device}, got {got} on {tensor.device} with strides {tensor.stride()}"
            )


# Cases --------------------------------------------------------------------------------------------------------------


def _case(shape: tuple[int, ...], blocksize: int, nested_blocksize: int = 0) -> Case:
    """Random bytes and a random table; double-quantised where ``nested_blocksize`` is not 0."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)

        def bytes_(n: int) -> torch.Tensor:
            return torch.randint(256, (n,), dtype=torch.uint8, device=device, generator=generator)

        def floats(*size: int) -> torch.Tensor:
            return torch.rand(size, device=device, generator=generator)

        n_weights = math.prod(shape)
        n_blocks = cdiv(n_weights, blocksize)
        code = floats(16).mul_(2).sub_(1).sort().values
        if not nested_blocksize:
            return (bytes_(cdiv(n_weights, 2)), floats(n_blocks), code, shape, blocksize), {"dtype": dtype}
        nested = floats(cdiv(n_blocks, nested_blocksize)), floats(256).mul_(2).sub_(1), floats().add_(0.5)
        args = (bytes_(cdiv(n_weights, 2)), bytes_(n_blocks), code, shape, blocksize, *nested, nested_blocksize)
        return args, {"dtype": dtype}

    kind = f"nested{nested_blocksize}" if nested_blocksize else "plain"
    return Case(f"{'x'.join(map(str, shape))}-{blocksize}-{kind}", make)


def cases() -> Sequence[Case]:
    """Several programs, one word, a last block, word or byte that is not full, each kind of block."""
    return [
        _case((96, 160), 64, 256),
        _case((96, 160), 64),
        _case((33, 123), 64, 4),
        _case((7, 11), 32, 256),
        _case((1, 8), 64),
        _case((3,), 64, 256),
        _case((5, 3, 40), 128, 2),
        _case((70, 130), 4096, 256),
    ]


def timings() -> Sequence[Timing]:
    """Llama 8B's MLP and key projections, double-quantised as QLoRA does."""
    shapes = [(14336, 4096), (1024, 4096)]
    return [Timing(_case(shape, 64, 256), bytes_forward=math.prod(shape) * 5 // 2) for shape in shapes]


OP = Op("nf4", dequantize_4bit, reference, cases, timings, differentiable=False)
