"""Backward of a gated linear unit between linears with adapters, with the adapters' own products over the tokens.

    dh = dy + u A          dgate, dup: ``ops/glu.py``          u = s dh_next B of the linear that reads h = act(gate) up

    dB_gate = s dgateᵀ t_gate          dB_up = s dupᵀ t_up          dA = uᵀ h

As products of their own the three would read what the kernel has at hand again, tensors of (T, I) for results of
(I, R). Here a program walks down a block of columns, one row tile after another, and keeps its sums in registers. The
rows are dealt out to ``splits`` programs in turn, whose sums are added afterwards: the same to the bit in every run.

Rounding: as in separate products, dgate, dup and h enter in their own dtype and sums are float32.

Shapes: T rows, I columns of the unit, R ranks. Everything but sums is of one dtype: float32, float16 or bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sloth_kernels.gradients import LowRankSum
from sloth_kernels.launch import Launcher, cdiv, interpreting, next_power_of_2, row_strides, tl, triton
from sloth_kernels.ops.glu import activation, results_of


class Tile(NamedTuple):
    """How the kernel walks: rows and columns of a tile, programs that share a column block, warps, loads ahead, and the
    registers of a thread: with fewer of them more programs wait for memory at a time. None for as many as it likes."""

    block_t: int
    block_i: int
    splits: int
    num_warps: int
    num_stages: int
    registers: int | None = None


TILE = Tile(32, 64, 7, 4, 2, 128)
MAX_RANK = 64
"""Of each of the three products: their sums stay in registers."""


class Contractions(NamedTuple):
    """What ``backward`` returns; None for what was not asked for."""

    dgate: torch.Tensor
    dup: torch.Tensor
    gate_IR: torch.Tensor | None
    """dgateᵀ t_gate, in float32 like the next two."""
    up_IR: torch.Tensor | None
    """dupᵀ t_up."""
    h_IR: torch.Tensor | None
    """hᵀ u."""


@triton.jit
def _load_rows(ptr, t, rows, stride, rank, BLOCK_R: tl.constexpr):
    """Rows ``t`` of (rows, rank), with 0 in what the block has beyond."""
    r = tl.arange(0, BLOCK_R)
    mask = (t < rows)[:, None] & (r < rank)[None, :]
    return tl.load(ptr + t.to(tl.int64)[:, None] * stride + r[None, :], mask=mask, other=0.0)


@triton.jit
def _store_sums(ptr, sums_IR, i, cols, columns, first, rank, BLOCK_R: tl.constexpr):
    """Columns ``first`` to ``first + rank`` of (cols, columns)."""
    r = tl.arange(0, BLOCK_R)
    at = i.to(tl.int64)[:, None] * columns + first + r[None, :]
    tl.store(ptr + at, sums_IR, mask=(i < cols)[:, None] & (r < rank)[None, :])


@Launcher
@triton.jit
def _glu_contractions_kernel(
    dy_ptr, u_ptr, A_ptr, gate_ptr, up_ptr, gate_t_ptr, up_t_ptr, dgate_ptr, dup_ptr, sums_ptr,
    rows, cols, blocks, splits, rank, gate_rank, up_rank, columns,
    dy_stride, u_stride, A_stride, gate_stride, up_stride, gate_t_stride, up_t_stride,
    VARIANT: tl.constexpr, WITH_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs that start together lie side by side in rows, so that pages of memory are read whole.
    split = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.arange(0, BLOCK_R)
    A_mask = (i < cols)[:, None] & (r < rank)[None, :]
    A_IR = tl.load(A_ptr + r[None, :] * A_stride + i[:, None], mask=A_mask, other=0.0)
    if WITH_H:
        h_IR = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    if BLOCK_G > 0:
        gate_IR = tl.zeros((BLOCK_I, BLOCK_G), tl.float32)
    if BLOCK_U > 0:
        up_IR = tl.zeros((BLOCK_I, BLOCK_U), tl.float32)
    # Tiles lie on their side, as the products over tokens take them: what one product leaves in registers the next
    # finds there.
    for tile in tl.range(split, tl.cdiv(rows, BLOCK_T), splits, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        t_wide = t.to(tl.int64)[None, :]
        mask = (i < cols)[:, None] & (t < rows)[None, :]
        u_TR = _load_rows(u_ptr, t, rows, u_stride, rank, BLOCK_R)
        dy = tl.load(dy_ptr + t_wide * dy_stride + i[:, None], mask=mask, other=0.0).to(tl.float32)
        dy = tl.dot(A_IR, tl.trans(u_TR), dy, input_precision="ieee")
        gate = tl.load(gate_ptr + t_wide * gate_stride + i[:, None], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + t_wide * up_stride + i[:, None], mask=mask, other=0.0).to(tl.float32)
        # Both are 0 beyond the rows. With dy in it, gate is laid out as the products are, and so is what is made of it.
        act, slope = activation(tl.where((t < rows)[None, :], gate, dy), VARIANT)
        dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
        dup = (dy * act).to(dup_ptr.dtype.element_ty)
        out = t_wide * cols + i[:, None]
        tl.store(dgate_ptr + out, dgate, mask=mask)
        tl.store(dup_ptr + out, dup, mask=mask)
        if WITH_H:
            h = (act * up).to(u_ptr.dtype.element_ty)
            h_IR = tl.dot(h, u_TR, h_IR, input_precision="ieee")
        if BLOCK_G > 0:
            t_TR = _load_rows(gate_t_ptr, t, rows, gate_t_stride, gate_rank, BLOCK_G)
            gate_IR = tl.dot(dgate, t_TR, gate_IR, input_precision="ieee")
        if BLOCK_U > 0:
            t_TR = _load_rows(up_t_ptr, t, rows, up_t_stride, up_rank, BLOCK_U)
            up_IR = tl.dot(dup, t_TR, up_IR, input_precision="ieee")
    own_ptr = sums_ptr + split.to(tl.int64) * cols * columns
    if BLOCK_G > 0:
        _store_sums(own_ptr, gate_IR, i, cols, columns, 0, gate_rank, BLOCK_G)
    if BLOCK_U > 0:
        _store_sums(own_ptr, up_IR, i, cols, columns, gate_rank, up_rank, BLOCK_U)
    if WITH_H:
        _store_sums(own_ptr, h_IR, i, cols, columns, gate_rank + up_rank, rank, BLOCK_R)


def takes(u_TR: torch.Tensor) -> bool:
    """Whether ``backward`` is worth it for such a u. In float32, without tensor cores, sums would not fit registers."""
    return u_TR.shape[1] <= MAX_RANK and (u_TR.dtype.itemsize == 2 or interpreting())


def sums_bytes(cols: int, columns: int) -> int:
    """What ``backward`` takes for its sums, for products of ``columns`` columns together."""
    return 4 * cols * columns * (TILE.splits + 1)


def backward(
    dh: LowRankSum,
    gate: torch.Tensor,
    up: torch.Tensor,
    variant: str,
    gate_t_TR: torch.Tensor | None,
    up_t_TR: torch.Tensor | None,
    with_h: bool,
    overwrite: bool = False,
    tile: Tile = TILE,
) -> Contractions:
    """dgate and dup (..., I), contiguous, and the products that are asked for.

    Args:
        dh: the gradient of h; its dy (T, I), u and A have contiguous rows.
        gate, up: (..., I).
        variant: of ``ops/glu.py``.
        gate_t_TR, up_t_TR: with contiguous rows; None for no product. Each rank is at most ``MAX_RANK``, as u's is.
        with_h: whether hᵀ u is wanted.
        overwrite: dgate and dup take the memory of gate and up, where those are contiguous.
        tile: how to walk.
    """
    # Whatever takes memory comes before the kernel: with ``overwrite`` it cannot run again.
    dgate, dup = results_of(gate, up, overwrite)
    gate, gate_stride, _ = row_strides(gate)
    up, up_stride, _ = row_strides(up)
    (rows, cols), u_TR = dh.dy_TK.shape, dh.u_TR
    ranks = [_rank(gate_t_TR), _rank(up_t_TR), u_TR.shape[1] if with_h else 0]
    blocks, splits = cdiv(cols, tile.block_i), min(tile.splits, cdiv(rows, tile.block_t))
    sums = u_TR.new_empty(splits, cols, sum(ranks), dtype=torch.float32)
    total = sums[0] if splits == 1 else torch.empty_like(sums[0])
    gate_t, up_t = (u_TR if t_TR is None else t_TR for t_TR in (gate_t_TR, up_t_TR))
    _glu_contractions_kernel(
        (blocks * splits,),
        dh.dy_TK, u_TR, dh.A_RK, gate, up, gate_t, up_t, dgate, dup, sums,
        rows, cols, blocks, splits, u_TR.shape[1], ranks[0], ranks[1], sum(ranks),
        dh.dy_TK.stride(0), u_TR.stride(0), dh.A_RK.stride(0), gate_stride, up_stride, gate_t.stride(0), up_t.stride(0),
        VARIANT=variant, WITH_H=with_h, BLOCK_R=_block(u_TR.shape[1]), BLOCK_G=_block(ranks[0]),
        BLOCK_U=_block(ranks[1]), BLOCK_T=tile.block_t, BLOCK_I=tile.block_i, STAGES=tile.num_stages,
        num_warps=tile.num_warps, maxnreg=tile.registers,
    )  # fmt: skip
    if splits > 1:
        torch.sum(sums, 0, out=total)
    parts = [part if part.shape[1] else None for part in total.split_with_sizes(ranks, 1)]
    return Contractions(dgate, dup, *parts)


def _rank(t_TR: torch.Tensor | None) -> int:
    return 0 if t_TR is None else t_TR.shape[1]


def _block(rank: int) -> int:
    """Columns of a block for ``rank`` of them; products are at least 16 wide."""
    return max(16, next_power_of_2(rank)) if rank else 0
