"""Cross entropy, entropy and hits of rows of logits, and in place of the logits their gradient.

    z = c tanh(scale x / c)           softcap c; without one z = scale x
    loss = lse(z) - z[y]              entropy = lse(z) - Σ_v p_v z_v            dx = (p - onehot(y)) dz/dx

A program takes a row. Its first pass keeps the running maximum m, s = Σ exp(z - m) and a = Σ exp(z - m) (z - m) over
blocks of columns (online softmax: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3), which give lse = m + log s
and entropy = log s - a / s; its second pass overwrites x by dx. Sums are float32 whatever the logits are.

Left out: a split of a row over programs. 128,256 bf16 logits are 256 KiB, which one SM streams twice in some tens of
microseconds, while the head's two products need 500 to read their weight: no bound however few the rows are.

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sloth_kernels.launch import next_power_of_2, on_device_of, tl, triton

BLOCK_V, NUM_WARPS, NUM_STAGES = 2048, 16, 1
"""Columns a program takes at a time (an 8-byte load a thread in bf16), its warps, and the blocks it holds or awaits."""
TORCH_TEMPORARIES = 6
"""Tensors of the chunk's size, in the dtype of ``stats_3C``, that ``torch_rows`` holds at its peak."""


@triton.jit
def _logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))
    return z


@triton.jit
def _cross_entropy_row_kernel(
    x_ptr,
    label_ptr,
    stats_ptr,
    n_vocab,
    x_stride,
    stats_stride,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    label = tl.load(label_ptr + row)
    in_range = (label >= 0) & (label < n_vocab)
    x_label = tl.load(x_ptr + label, mask=in_range, other=float("nan"))
    z_label = _logits(x_label, scale, softcap, HAS_SOFTCAP)

    # Each lane keeps its own m, s and a: no block waits for a maximum across the warps, and of the two factors that
    # rescale (what was summed, what is added) one is always 1, so that an element costs one exponential.
    m = tl.full([BLOCK], -1e30, tl.float32)  # finite: from -inf the first rescaling would be 0 * inf
    s = tl.zeros([BLOCK], tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    tied = tl.zeros([BLOCK], tl.int1)  # with the label, and before it
    for start in tl.range(0, n_vocab, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        # The stride is a multiple of 16 elements and V need not be: masked by it, loads stay vectorised.
        x = tl.load(x_ptr + cols, mask=cols < x_stride, other=0.0)
        z = tl.where(cols < n_vocab, _logits(x, scale, softcap, HAS_SOFTCAP), float("-inf"))
        tied = tied | ((z == z_label) & (cols < label))
        d = z - m
        e = tl.exp(-tl.abs(d))
        a = tl.where(d > 0, e * (a - d * s), a + e * tl.maximum(d, -1e30))  # not 0 * -inf where z is -inf
        s = tl.where(d > 0, e * s + 1.0, s + e)
        m = tl.maximum(m, z)
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
        n_blocks = tl.cdiv(n_vocab, BLOCK)
        for i in tl.range(n_blocks, num_stages=STAGES):
            # Last block first: it is the one most likely still in the L2 cache.
            cols = (n_blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + cols, mask=cols < x_stride, other=0.0)
            z = _logits(x, scale, softcap, HAS_SOFTCAP)
            dx = (tl.exp(z - lse) - tl.where(cols == label, 1.0, 0.0)) * scale
            if HAS_SOFTCAP:
                dx = dx * (1.0 - (z / softcap) * (z / softcap))
            tl.store(x_ptr + cols, dx, mask=cols < x_stride)


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
    block = min(BLOCK_V, next_power_of_2(vocab))
    with on_device_of(x_CV):
        _cross_entropy_row_kernel[(rows,)](
            *(x_CV, labels_C, stats_3C, vocab, x_CV.stride(0), stats_3C.stride(0), scale, softcap or 1.0),
            HAS_SOFTCAP=softcap is not None,
            WRITE_GRAD=write_grad,
            BLOCK=block,
            STAGES=NUM_STAGES,
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
