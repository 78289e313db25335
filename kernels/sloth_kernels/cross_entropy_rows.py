"""Cross entropy, entropy and hits of rows of logits, and in place of the logits their gradient.

    z = c tanh(scale x / c)           softcap c; without one z = scale x
    loss = lse(z) - z[y]              entropy = lse(z) - Σ_v p_v z_v            dx = (p - onehot(y)) dz/dx

A program takes a row. Its first pass keeps the running maximum m, s = Σ exp(z - m) and a = Σ exp(z - m) (z - m) over
blocks of columns (online softmax: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3), which give lse = m + log s
and entropy = log s - a / s; its second pass overwrites x by dx. Sums are float32 whatever the logits are. Each lane
keeps an m, s and a of its own and rescales them once for the PER columns it takes of a block: no block waits for a
maximum across the warps. Masks, ties and the label are seen to in the blocks that need it alone: what a column costs
is arithmetic before it is memory.

Left out: a split of a row over programs. 128,256 bf16 logits are 256 KiB, which one SM streams twice in some tens of
microseconds, while the head's two products need 500 to read their weight: no bound however few the rows are.

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sloth_kernels.launch import next_power_of_2, on_device_of, tl, triton

BLOCK_V, NUM_WARPS, PER = 4096, 16, 8
"""Columns a program takes at a time, its warps, and the columns of a lane (16 bytes of bf16)."""
TORCH_TEMPORARIES = 6
"""Tensors of the chunk's size, in the dtype of ``stats_3C``, that ``torch_rows`` holds at its peak."""


@triton.jit
def _logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))
    return z


@triton.jit
def _load_block(x_ptr, start, n_vocab, x_stride, scale, softcap, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr,
                PER: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Columns from ``start`` on and their z; -inf in those beyond the vocabulary, which only the last block has."""
    cols = start + tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    if LAST:
        # The stride is a multiple of 16 elements and V need not be: masked by it, loads stay vectorised.
        x = tl.load(x_ptr + cols, mask=cols < x_stride, other=0.0)
        z = tl.where(cols < n_vocab, _logits(x, scale, softcap, HAS_SOFTCAP), float("-inf"))
    else:
        z = _logits(tl.load(x_ptr + cols), scale, softcap, HAS_SOFTCAP)
    return cols, z


@triton.jit
def _add_block(z, m, s, a):
    """The lanes' m, s and a with those of one more block."""
    top = tl.maximum(m, tl.max(z, 1))
    shrink = tl.exp(m - top)
    d = z - top[:, None]
    e = tl.exp(d)
    a = shrink * (a + (m - top) * s) + tl.sum(e * tl.maximum(d, -1e30), 1)  # not 0 * -inf where z is -inf
    return top, shrink * s + tl.sum(e, 1), a


@triton.jit
def _find_ties(z, cols, start, label, z_label, tied, BLOCK: tl.constexpr):
    """Lanes that have seen a z at least as large as the label's, before it."""
    if start + BLOCK <= label:
        tied = tied | (tl.max(z, 1) >= z_label)
    elif start <= label:
        tied = tied | (tl.max(((z >= z_label) & (cols < label)).to(tl.int32), 1) > 0)
    return tied


@triton.jit
def _store_grad(x_ptr, z, cols, start, label, lse, x_stride, scale, softcap, HAS_SOFTCAP: tl.constexpr,
                BLOCK: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    p = tl.exp(z - lse)
    if (start <= label) & (label < start + BLOCK):
        p = p - tl.where(cols == label, 1.0, 0.0)
    dx = p * scale
    if HAS_SOFTCAP:
        dx = dx * (1.0 - (z / softcap) * (z / softcap))
    if LAST:
        tl.store(x_ptr + cols, dx, mask=cols < x_stride)
    else:
        tl.store(x_ptr + cols, dx)


@triton.jit
def _cross_entropy_row_kernel(
    x_ptr, label_ptr, stats_ptr, n_vocab, x_stride, stats_stride, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, WRITE_GRAD: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * PER
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    label = tl.load(label_ptr + row)
    in_range = (label >= 0) & (label < n_vocab)
    x_label = tl.load(x_ptr + label, mask=in_range, other=float("nan"))
    z_label = _logits(x_label, scale, softcap, HAS_SOFTCAP)

    m = tl.full([LANES], -1e30, tl.float32)  # finite: from -inf the first rescaling would be 0 * inf
    s = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    tied = tl.zeros([LANES], tl.int1)
    last = n_vocab // BLOCK * BLOCK
    for start in tl.range(0, last, BLOCK):
        cols, z = _load_block(x_ptr, start, n_vocab, x_stride, scale, softcap, HAS_SOFTCAP, LANES, PER, False)
        tied = _find_ties(z, cols, start, label, z_label, tied, BLOCK)
        m, s, a = _add_block(z, m, s, a)
    if last < n_vocab:
        cols, z = _load_block(x_ptr, last, n_vocab, x_stride, scale, softcap, HAS_SOFTCAP, LANES, PER, True)
        tied = _find_ties(z, cols, last, label, z_label, tied, BLOCK)
        m, s, a = _add_block(z, m, s, a)
    top = tl.max(m, 0)
    shrink = tl.exp(m - top)
    total = tl.sum(shrink * s, 0)
    entropy = tl.log(total) - tl.sum(shrink * (a + (m - top) * s), 0) / total
    lse = top + tl.log(total)
    hit = (z_label >= top) & (tl.max(tied.to(tl.int32), 0) == 0)
    tl.store(stats_ptr + row, lse - z_label)
    tl.store(stats_ptr + stats_stride + row, entropy)
    tl.store(stats_ptr + 2 * stats_stride + row, hit.to(tl.float32))

    if WRITE_GRAD:
        lse = tl.where(in_range, lse, float("nan"))
        # Last block first: it is the one most likely still in the L2 cache.
        if last < n_vocab:
            cols, z = _load_block(x_ptr, last, n_vocab, x_stride, scale, softcap, HAS_SOFTCAP, LANES, PER, True)
            _store_grad(x_ptr, z, cols, last, label, lse, x_stride, scale, softcap, HAS_SOFTCAP, BLOCK, True)
        for i in tl.range(last // BLOCK):
            start = last - (i + 1) * BLOCK
            cols, z = _load_block(x_ptr, start, n_vocab, x_stride, scale, softcap, HAS_SOFTCAP, LANES, PER, False)
            _store_grad(x_ptr, z, cols, start, label, lse, x_stride, scale, softcap, HAS_SOFTCAP, BLOCK, False)


def triton_rows(
    x_CV: torch.Tensor,
    labels_C: torch.Tensor,
    stats_3C: torch.Tensor,
    scale: float,
    softcap: float | None,
    write_grad: bool,
) -> None:
    """Fill ``stats_3C`` with loss, entropy (nats) and 1 where the label is the first largest logit, else 0.

    ``x_CV``: logits in float32, float16 or bfloat16, whose rows are contiguous and a multiple of 16 elements apart;
    what lies between them is ignored and may be overwritten. With ``write_grad`` it becomes the gradient of the sum of
    the losses by itself. ``labels_C``: contiguous int64. ``stats_3C``: float32, rows any distance apart.

    A label outside [0, V) makes its row's loss and gradient NaN: an error would have to wait for the device.
    """
    rows, vocab = x_CV.shape
    block = max(PER, min(BLOCK_V, next_power_of_2(vocab)))
    with on_device_of(x_CV):
        _cross_entropy_row_kernel[(rows,)](
            *(x_CV, labels_C, stats_3C, vocab, x_CV.stride(0), stats_3C.stride(0), scale, softcap or 1.0),
            HAS_SOFTCAP=softcap is not None,
            WRITE_GRAD=write_grad,
            LANES=block // PER,
            PER=PER,
            num_warps=max(1, NUM_WARPS * block // BLOCK_V),
        )


def torch_rows(
    x_CV: torch.Tensor,
    labels_C: torch.Tensor,
    stats_3C: torch.Tensor,
    scale: float,
    softcap: float | None,
    write_grad: bool,
) -> None:
    """The same in plain torch, for any device, layout and dtype; it computes in the dtype of ``stats_3C``.

    A label outside [0, V) raises ``IndexError`` on the CPU, as in ``F.cross_entropy``.
    """
    z_CV, slope = x_CV.to(stats_3C.dtype) * scale, scale
    if softcap is not None:
        t_CV = torch.tanh(z_CV / softcap)
        z_CV, slope = t_CV * softcap, scale * (1 - t_CV * t_CV)
    log_p_CV = z_CV.log_softmax(-1)
    # No label is this small, so none is passed over: by default F.nll_loss would give -100 a loss of 0.
    stats_3C[0] = F.nll_loss(log_p_CV, labels_C, reduction="none", ignore_index=torch.iinfo(torch.int64).min)
    stats_3C[2] = z_CV.argmax(-1) == labels_C
    p_CV = log_p_CV.exp_()
    stats_3C[1] = torch.special.entr(p_CV).sum(-1)
    if write_grad:
        p_CV.scatter_add_(1, labels_C[:, None], -torch.ones_like(p_CV[:, :1]))
        x_CV.copy_(p_CV.mul_(slope))
