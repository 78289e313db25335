"""Adam and AdamW over many tensors in one launch, with bitsandbytes' states, equal to the bit to its CUDA kernels.

    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²                        Kingma and Ba, arXiv:1412.6980
    p ← (p - η √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε √(1 - β₂ᵗ))) (1 - η λ)     weight decay after the update

m and v are float32, or indices into maps of 256 values with a scale for each block of 256 (Dettmers et al.,
arXiv:2110.02861). What is not finite in a gradient leaves 8-bit parameters alone and sets both moments to 0.

bitsandbytes is compiled with fast arithmetic: products and sums contracted, approximate roots, powers and quotients,
denormal numbers flushed. Equality to the bit needs the same instructions in the same order, so on a GPU (``NATIVE``)
they are written out. For float32 parameters its compiler contracted the 8-bit second moment another way.

Layout: the host lists addresses, the kernels look them up: ``table`` holds those of the T parameters, then for each
tensor those of its state (``FIELDS_8BIT`` or ``FIELDS_32BIT``), ``grads`` those of the T gradients. A program takes a
chunk of ``CHUNK`` elements of one tensor; ``chunks`` (C, 2) says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sloth_kernels.launch import interpreting, on_device_of, tl, triton

BLOCK = 256
"""Elements that share a scale."""
CHUNK = 4 * BLOCK
FIELDS_8BIT = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")
FIELDS_32BIT = ("state1", "state2")


class Hyper(NamedTuple):
    """What a step is told beside the tensors."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Steps of these tensors, this one included."""


@triton.jit
def _mul(a, b, NATIVE: tl.constexpr):
    out = a * b
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def _fma(a, b, c, NATIVE: tl.constexpr):
    out = a * b + c
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def _sqrt(a, NATIVE: tl.constexpr):
    out = tl.sqrt(a)
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def _reciprocal(a, NATIVE: tl.constexpr):
    out = 1.0 / a
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def _power(base, exponent, NATIVE: tl.constexpr):
    out = tl.exp2(exponent * tl.log2(base))
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; mul.rn.ftz.f32 t, t, $2; ex2.approx.ftz.f32 $0, t; }",
            "=f,f,f", [base, exponent], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def _corrections(beta1, beta2, lr, step, NATIVE: tl.constexpr):
    """-η √(1 - β₂ᵗ) / (1 - β₁ᵗ), and √(1 - β₂ᵗ)."""
    steps = step.to(tl.float32)
    root = _sqrt(1.0 - _power(beta2, steps, NATIVE), NATIVE)
    return -_mul(_mul(root, lr, NATIVE), _reciprocal(1.0 - _power(beta1, steps, NATIVE), NATIVE), NATIVE), root


@triton.jit
def _moved(p, m, v, step_size, root, eps, decay, DECAY: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    denominator = _fma(root, eps, _sqrt(v, NATIVE), NATIVE)
    p = _fma(step_size, _mul(_reciprocal(denominator, NATIVE), m, NATIVE), p.to(tl.float32), NATIVE).to(DTYPE)
    if DECAY:
        p = _mul(decay, p.to(tl.float32), NATIVE).to(DTYPE)
    return p


@triton.jit
def _nearest(map_ptr, x, LOWEST: tl.constexpr):
    """Index and value of the entry nearest to ``x``; of two as near, the even index, which the search ends at."""
    index = tl.full(x.shape, 127, tl.int32)
    value = tl.load(map_ptr + index)
    low_index = tl.zeros(x.shape, tl.int32)
    high_index = tl.full(x.shape, 255, tl.int32)
    low = tl.full(x.shape, LOWEST, tl.float32)
    high = tl.full(x.shape, 1.0, tl.float32)
    for k in tl.static_range(7):
        above = x > value
        low_index = tl.where(above, index, low_index)
        low = tl.where(above, value, low)
        high_index = tl.where(above, high_index, index)
        high = tl.where(above, high, value)
        index += tl.where(above, 64 >> k, -(64 >> k))
        value = tl.load(map_ptr + index)
    above = x > value
    other = tl.where(above, high, low)
    middle = (other + value) * 0.5
    # A comparison with NaN, from a block of zeros, is false: the search then ends at 0.
    beyond = (above & (x > middle)) | ((x <= value) & (x < middle))
    other_index = tl.where(above, high_index, low_index)
    return tl.where(beyond, other_index, index), tl.where(beyond, other, value)


@triton.jit
def _below_zero(x):
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit(do_not_specialize=["n_tensors", "step"])
def _adam_8bit_kernel(
    table_ptr, grads_ptr, sizes_ptr, chunks_ptr, n_tensors, lr, beta1, beta2, eps, weight_decay, step,
    DTYPE: tl.constexpr, DECAY: tl.constexpr, NATIVE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    blocks = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    size = tl.load(sizes_ptr + tensor)
    mask, live = offsets < size, blocks * BLOCK < size
    state_ptr = table_ptr + n_tensors + 6 * tensor
    p_ptrs = tl.load(table_ptr + tensor).to(tl.pointer_type(DTYPE)) + offsets  # pyright: ignore[reportArgumentType]
    g_ptrs = tl.load(grads_ptr + tensor).to(tl.pointer_type(DTYPE)) + offsets  # pyright: ignore[reportArgumentType]
    m_ptrs = tl.load(state_ptr).to(tl.pointer_type(tl.uint8)) + offsets
    v_ptrs = tl.load(state_ptr + 1).to(tl.pointer_type(tl.uint8)) + offsets
    m_max_ptrs = tl.load(state_ptr + 2).to(tl.pointer_type(tl.float32)) + blocks
    v_max_ptrs = tl.load(state_ptr + 3).to(tl.pointer_type(tl.float32)) + blocks
    m_map_ptr = tl.load(state_ptr + 4).to(tl.pointer_type(tl.float32))
    v_map_ptr = tl.load(state_ptr + 5).to(tl.pointer_type(tl.float32))

    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    finite = tl.abs(g) < float("inf")
    # Past the end of a tensor the first moment's index counts as 128, which can be the block's largest value.
    m = tl.load(m_map_ptr + tl.load(m_ptrs, mask=mask, other=128).to(tl.int32))
    v = tl.load(v_map_ptr + tl.load(v_ptrs, mask=mask, other=0).to(tl.int32))
    m = _mul(tl.load(m_max_ptrs, mask=live, other=0.0)[:, None], m, NATIVE)
    v = _mul(tl.load(v_max_ptrs, mask=live, other=0.0)[:, None], v, NATIVE)
    m = _fma(g, 1.0 - beta1, _mul(m, beta1, NATIVE), NATIVE)
    scaled = _mul(g, 1.0 - beta2, NATIVE)
    if DTYPE.primitive_bitwidth == 32:  # pyright: ignore[reportAttributeAccessIssue]
        v = _fma(g, scaled, _mul(v, beta2, NATIVE), NATIVE)
    else:
        v = _fma(v, beta2, _mul(g, scaled, NATIVE), NATIVE)
    m = tl.where(finite, m, 0.0)
    v = tl.where(finite, v, 0.0)

    step_size, root = _corrections(beta1, beta2, lr, step, NATIVE)
    decay = _fma(-lr, weight_decay, 1.0, NATIVE)
    p = tl.load(p_ptrs, mask=mask, other=0.0)
    moved = _moved(p, m, v, step_size, root, eps, decay, DECAY, DTYPE, NATIVE)
    tl.store(p_ptrs, tl.where(finite, moved, p), mask=mask)

    m_max, v_max = tl.max(tl.abs(m), 1), tl.max(tl.abs(v), 1)
    tl.store(m_max_ptrs, m_max, mask=live)
    tl.store(v_max_ptrs, v_max, mask=live)
    m_index, nearest = _nearest(m_map_ptr, _mul(_reciprocal(m_max, NATIVE)[:, None], m, NATIVE), -1.0)
    v_index, _ = _nearest(v_map_ptr, _mul(_reciprocal(v_max, NATIVE)[:, None], v, NATIVE), 0.0)
    # The first moment keeps its sign: the entry beside is taken, of 256 in a circle.
    turned = _below_zero(nearest) != _below_zero(m)
    m_index += tl.where(turned, tl.where(m > 0.0, 1, -1), 0)
    tl.store(m_ptrs, (m_index & 255).to(tl.uint8), mask=mask)
    tl.store(v_ptrs, v_index.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["n_tensors", "step"])
def _adam_32bit_kernel(
    table_ptr, grads_ptr, sizes_ptr, chunks_ptr, n_tensors, lr, beta1, beta2, eps, weight_decay, step,
    DTYPE: tl.constexpr, DECAY: tl.constexpr, NATIVE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    offsets = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < tl.load(sizes_ptr + tensor)
    state_ptr = table_ptr + n_tensors + 2 * tensor
    p_ptrs = tl.load(table_ptr + tensor).to(tl.pointer_type(DTYPE)) + offsets  # pyright: ignore[reportArgumentType]
    g_ptrs = tl.load(grads_ptr + tensor).to(tl.pointer_type(DTYPE)) + offsets  # pyright: ignore[reportArgumentType]
    m_ptrs = tl.load(state_ptr).to(tl.pointer_type(tl.float32)) + offsets
    v_ptrs = tl.load(state_ptr + 1).to(tl.pointer_type(tl.float32)) + offsets

    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0)
    v = tl.load(v_ptrs, mask=mask, other=0.0)
    m = _fma(m, beta1, _mul(g, 1.0 - beta1, NATIVE), NATIVE)
    v = _fma(v, beta2, _mul(_mul(g, g, NATIVE), 1.0 - beta2, NATIVE), NATIVE)
    step_size, root = _corrections(beta1, beta2, lr, step, NATIVE)
    decay = _fma(-lr, weight_decay, 1.0, NATIVE)
    p = tl.load(p_ptrs, mask=mask, other=0.0)
    tl.store(p_ptrs, _moved(p, m, v, step_size, root, eps, decay, DECAY, DTYPE, NATIVE), mask=mask)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)


def update(
    table: torch.Tensor,
    grads: torch.Tensor,
    sizes: torch.Tensor,
    chunks: torch.Tensor,
    dtype: torch.dtype,
    eight_bit: bool,
    hyper: Hyper,
) -> None:
    """Update the tensors whose addresses ``table`` holds, all in one launch on the current stream.

    Args:
        table: (T + T F,) int64, as the module's text says; F is the number of fields of a state.
        grads: (T,) int64.
        sizes: (T,) int64, the elements of each tensor.
        chunks: (C, 2) int32, tensor and place in it (in units of ``CHUNK``) of each chunk.
        dtype: of parameters and gradients.
        eight_bit: whether the states are indices.
        hyper: the same for all of them.
    """
    if not len(chunks):
        return
    kernel, tile = (
        (_adam_8bit_kernel, {"BLOCKS": CHUNK // BLOCK, "BLOCK": BLOCK})
        if eight_bit
        else (_adam_32bit_kernel, {"CHUNK": CHUNK})
    )
    with on_device_of(table):
        kernel[(len(chunks),)](
            table, grads, sizes, chunks, len(sizes),
            hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.step,
            DTYPE=_element_type(dtype),
            DECAY=hyper.weight_decay > 0,
            NATIVE=not interpreting(),
            **tile,
            num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def _element_type(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def reference(p: torch.Tensor, g: torch.Tensor, state: Mapping[str, Any], hyper: Hyper) -> None:
    """The same in plain float32 arithmetic, in place: ``p``, ``g`` contiguous, of any shape and floating dtype.

    ``state`` holds ``FIELDS_8BIT`` where its state1 is uint8, else ``FIELDS_32BIT``.
    """
    if state["state1"].dtype == torch.uint8:
        _reference_8bit(p, g, state, hyper)
        return
    grad, m, v = g.float(), state["state1"], state["state2"]
    m.copy_(m * hyper.beta1 + grad * _one_minus(hyper.beta1))
    v.copy_(v * hyper.beta2 + grad * grad * _one_minus(hyper.beta2))
    p.copy_(_reference_moved(p, m, v, hyper))


def _reference_8bit(p: torch.Tensor, g: torch.Tensor, state: Mapping[str, Any], hyper: Hyper) -> None:
    indices_m, indices_v, m_max, v_max, m_map, v_map = (state[field] for field in FIELDS_8BIT)
    grad = _blocks(g.float(), len(m_max), 0.0)
    m = m_max[:, None] * m_map[_blocks(indices_m, len(m_max), 128).int()]
    v = v_max[:, None] * v_map[_blocks(indices_v, len(m_max), 0).int()]
    finite = grad.isfinite()
    m = torch.where(finite, grad * _one_minus(hyper.beta1) + m * hyper.beta1, 0.0)
    v = torch.where(finite, v * hyper.beta2 + grad * (grad * _one_minus(hyper.beta2)), 0.0)
    moved = _reference_moved(_blocks(p, len(m_max), 0.0), m, v, hyper)
    p.copy_(torch.where(finite, moved, _blocks(p, len(m_max), 0.0)).flatten()[: p.numel()].view_as(p))
    m_max.copy_(m.abs().amax(1))
    v_max.copy_(v.abs().amax(1))
    m_index, nearest = _reference_nearest(m_map, (1 / m_max)[:, None] * m, -1.0)
    v_index, _ = _reference_nearest(v_map, (1 / v_max)[:, None] * v, 0.0)
    turned = nearest.signbit() != m.signbit()
    m_index = (m_index + turned * torch.where(m > 0, 1, -1)) & 255
    indices_m.copy_(m_index.flatten()[: p.numel()].view_as(indices_m))
    indices_v.copy_(v_index.flatten()[: p.numel()].view_as(indices_v))


def _blocks(x: torch.Tensor, count: int, filler: float) -> torch.Tensor:
    """``x`` as ``count`` rows of a block, the last filled up."""
    return torch.nn.functional.pad(x.flatten(), (0, count * BLOCK - x.numel()), value=filler).view(count, BLOCK)


def _one_minus(beta: float) -> torch.Tensor:
    return 1 - torch.tensor(beta)


def _reference_moved(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    lr, beta1, beta2, eps, weight_decay, steps = map(torch.tensor, map(float, hyper))
    root = (1 - (steps * beta2.log2()).exp2()).sqrt()
    step_size = -(root * lr * (1 / (1 - (steps * beta1.log2()).exp2())))
    moved = (p.float() + step_size * (1 / (v.sqrt() + root * eps) * m)).to(p.dtype)
    return (moved.float() * (1 - lr * weight_decay)).to(p.dtype) if hyper.weight_decay > 0 else moved


def _reference_nearest(values: torch.Tensor, x: torch.Tensor, lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and value of the entry nearest to each ``x``; ``lowest`` stands for the first where it was not met."""
    index = torch.full_like(x, 127, dtype=torch.long)
    low_index, high_index = torch.zeros_like(index), torch.full_like(index, 255)
    low, high = torch.full_like(x, lowest), torch.ones_like(x)
    for half in (64, 32, 16, 8, 4, 2, 1):
        above, value = x > values[index], values[index]
        low_index, low = torch.where(above, index, low_index), torch.where(above, value, low)
        high_index, high = torch.where(above, high_index, index), torch.where(above, high, value)
        index = index + torch.where(above, half, -half)
    above, value = x > values[index], values[index]
    other = torch.where(above, high, low)
    middle = (other + value) * 0.5
    beyond = torch.where(above, x > middle, x < middle)
    return torch.where(beyond, torch.where(above, high_index, low_index), index), torch.where(beyond, other, value)
