"""Cross entropy of a linear head, and its statistics, without ever holding the T x V logits.

    x = h Wᵀ + b                      the head, in the working dtype, as ``F.linear`` rounds it
    z = c tanh(scale x / c)           softcap c (Gemma 2); without one z = scale x (Cohere, Granite)
    loss_sum = Σ_t lse(z_t) - z_t[y_t]             entropy_sum = Σ_t lse(z_t) - Σ_v p_tv z_tv
    dx = (p - onehot(y)) dz/dx        dh = dx W        dW = dxᵀ h        db = Σ_t dx

over the rows t whose label y_t is not ``ignore_index``. Those rows are gathered first, so the others cost nothing, and
go through in chunks: one product fills a buffer with the chunk's x, ``triton_rows`` takes the statistics and
overwrites x by dx, and one product each turns dx into dh and, for a head that trains, dW. Since |p - onehot| <= 1,
gradients of the *sum* are taken in the forward, so that no product is recomputed, and multiplied by the upstream
scalar in the backward. Memory beside the results: the buffer (``LOGITS_BYTES``), and a float32 dW where several chunks
add up to one.

Left out: sharded weights (gather them first); second derivatives (they raise).

Shapes: T tokens, N of them with a label, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._C._autograd import _get_current_graph_task_keep_graph

from sloth_kernels.cases.linear_cross_entropy import cases, timings
from sloth_kernels.cross_entropy_rows import TORCH_TEMPORARIES, torch_rows, triton_rows
from sloth_kernels.known import know
from sloth_kernels.labelled_rows import LabelledRows
from sloth_kernels.launch import cdiv, on_device_of, runs_triton, tl, triton
from sloth_kernels.op import Op
from sloth_kernels.relief import with_relief

LOGITS_BYTES = 512 * 2**20
"""Bound on a chunk's logits and the temporaries over them."""
ROW_QUANTUM = 128
"""Chunks are multiples of this many rows, the tile of a matrix product."""


class LossSums(NamedTuple):
    """Sums over the rows with a label, each a 0-dim tensor; only ``loss_sum`` is differentiable."""

    loss_sum: torch.Tensor
    """Negative log likelihood in nats; float32 (float64 for float64 inputs)."""
    entropy_sum: torch.Tensor
    """Shannon entropy of the predictions in nats; dtype as ``loss_sum``."""
    n_correct: torch.Tensor
    """int64: rows whose label is the first of the largest logits."""
    n_valid: torch.Tensor
    """int64: rows with a label."""


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    ignore_index: int
    chunk_rows: int | None
    rows: LabelledRows | None = None
    logits_bytes: int | None = None
    rounded_sums: bool = False


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over rows."""
    return torch.promote_types(dtype, torch.float32)


def reference(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    rows: LabelledRows | None = None,
    logits_bytes: int | None = None,
    rounded_sums: bool = False,
) -> LossSums:
    """The truth, as transformers computes it: logits, scale and softcap in the working dtype, float32 from there on.

    It holds all logits, whatever ``chunk_rows`` says.
    """
    logits_TV = F.linear(hidden_TH, weight_VH, bias_V)
    if scale != 1.0:
        logits_TV = logits_TV * scale
    if softcap is not None:
        logits_TV = torch.tanh(logits_TV / softcap) * softcap
    logits_TV = logits_TV.to(_wide(logits_TV.dtype))
    loss_sum = F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    valid_T = labels_T != ignore_index
    logits_NV = logits_TV.detach()[valid_T]
    entropy_sum = torch.special.entr(logits_NV.softmax(-1)).sum()
    n_correct = (logits_NV.argmax(-1) == labels_T[valid_T]).sum()
    return LossSums(loss_sum, entropy_sum, n_correct, valid_T.sum())


# Forward ------------------------------------------------------------------------------------------------------------


def _in_working_dtype(*tensors: torch.Tensor | None) -> list[Any]:
    """What ``F.linear`` computes with: the tensors themselves, under autocast casts of all but float64 ones."""
    cast = list(tensors)
    device_type = next(t.device.type for t in tensors if t is not None)
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    dtypes = {str(t.dtype) for t in cast if t is not None}
    if len(dtypes) > 1:
        raise RuntimeError(
            f"expected hidden, weight and bias of one dtype, got {sorted(dtypes)}; cast them or use torch.autocast"
        )
    return cast


def rows_per_chunk(n_rows: int, row_bytes: int, logits_bytes: int | None = None) -> int:
    """The fewest chunks within ``logits_bytes``, about equally long: a chunk of few rows would still read all of W."""
    most = max(1, (logits_bytes or LOGITS_BYTES) // row_bytes // ROW_QUANTUM) * ROW_QUANTUM
    rows = cdiv(n_rows, max(1, cdiv(n_rows, most)))
    return max(1, cdiv(rows, ROW_QUANTUM)) * ROW_QUANTUM


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """``total += left @ right`` in ``total``'s dtype; the ``first`` overwrites whatever ``total`` held."""
    mixed: dict[str, Any] = {}
    if total.dtype != left.dtype and total.is_cuda and torch.version.hip is None:
        mixed = {"out_dtype": total.dtype}
    else:  # neither the CPU nor ROCm multiplies half-precision matrices into a float32 result
        left, right = left.to(total.dtype), right.to(total.dtype)
    torch.addmm(total, left, right, beta=0 if first else 1, out=total, **mixed)


class _Gradients(NamedTuple):
    """Gradients of the loss sum by the labelled rows of hidden, weight and bias; None for what needs none."""

    hidden_NH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None

    def add(self, dx_CV: torch.Tensor, hidden_CH: torch.Tensor, weight_VH: torch.Tensor, rows: slice) -> None:
        if self.hidden_NH is not None:
            torch.mm(dx_CV, weight_VH, out=self.hidden_NH[rows])
        if self.weight_VH is not None:
            _add_product(self.weight_VH, dx_CV.t(), hidden_CH, first=rows.start == 0)
        if self.bias_V is not None:
            self.bias_V.add_(dx_CV.sum(0, dtype=self.bias_V.dtype))


def _empty_gradients(
    needs: tuple[bool, ...], hidden_TH: torch.Tensor, weight_VH: torch.Tensor, n_rows: int, weight_sum: torch.dtype
) -> _Gradients:
    """``weight_sum`` is dW's dtype; without rows no product comes to overwrite dW, so it starts as zeros."""
    new_weight = weight_VH.new_empty if n_rows else weight_VH.new_zeros
    return _Gradients(
        hidden_TH.new_empty(n_rows, hidden_TH.shape[1]) if needs[0] else None,
        new_weight(weight_VH.shape, dtype=weight_sum) if needs[1] else None,
        weight_VH.new_zeros(len(weight_VH), dtype=_wide(weight_VH.dtype)) if needs[2] else None,
    )


def _forward(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_T: torch.Tensor,
    opt: _Options,
    needs: tuple[bool, ...],
) -> tuple[LossSums, torch.Tensor | None, _Gradients]:
    """The sums, the rows they are over (None for all), and the gradients of ``loss_sum`` that ``needs`` asks for."""
    bf16_weight = weight_VH.dtype == torch.bfloat16
    hidden_TH, weight_VH, bias_V = _in_working_dtype(hidden_TH, weight_VH, bias_V)
    rows_N = (opt.rows or LabelledRows(labels_T, opt.ignore_index)).indices()
    labels_N = (labels_T if rows_N is None else labels_T[rows_N]).contiguous()
    n_rows, n_vocab, wide = len(labels_N), len(weight_VH), _wide(hidden_TH.dtype)

    # Rows 64 elements apart keep cuBLAS and the kernel on aligned accesses for every V.
    stride = cdiv(n_vocab, 64) * 64
    rows_pass, temporaries = (triton_rows, 0) if runs_triton(hidden_TH) else (torch_rows, TORCH_TEMPORARIES)
    logit_bytes = hidden_TH.element_size() + temporaries * wide.itemsize
    step = opt.chunk_rows or rows_per_chunk(n_rows, stride * logit_bytes, opt.logits_bytes)
    buffer = hidden_TH.new_empty(min(step, n_rows), stride)
    if not buffer.is_cuda:
        buffer[:, n_vocab:].zero_()  # oneDNN multiplies what lies behind odd rows of bfloat16 by 0, and NaN stays NaN
    stats_3N = hidden_TH.new_empty(3, n_rows, dtype=wide)
    # A float16 dW stays float32 until the upstream scalar is known: unlike stock's mean, the sum may exceed 65,504.
    weight_sum = torch.bfloat16 if bf16_weight and (n_rows <= step or opt.rounded_sums) else wide
    grads = _empty_gradients(needs, hidden_TH, weight_VH, n_rows, weight_sum)

    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        hidden_CH = hidden_TH[rows] if rows_N is None else hidden_TH[rows_N[rows]]
        x_CV = buffer[: len(hidden_CH), :n_vocab]
        if bias_V is None:
            torch.mm(hidden_CH, weight_VH.t(), out=x_CV)
        else:
            torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=x_CV)
        rows_pass(x_CV, labels_N[rows], stats_3N[:, rows], opt.scale, opt.softcap, any(needs))
        grads.add(x_CV, hidden_CH, weight_VH, rows)

    if bf16_weight and grads.weight_VH is not None:
        x_CV = buffer = None  # the logits' memory is free before dW takes some in a second dtype
        grads = grads._replace(weight_VH=grads.weight_VH.to(torch.bfloat16))
    loss_sum, entropy_sum, n_correct = (row_N.sum() for row_N in stats_3N)  # no views: users write loss /= n
    n_valid = know(labels_T.new_full((), n_rows), n_rows)
    return LossSums(loss_sum, entropy_sum, n_correct.long(), n_valid), rows_N, grads


# Backward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _linear_cross_entropy_scale_kernel(x_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, x * tl.load(factor_ptr), mask=i < n)


def _scaled(saved: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """``saved * factor`` in ``dtype``, multiplied in float32: torch would first round the factor to bf16 or fp16.

    In place when the graph is not kept for another backward: nobody reads ``saved`` again.
    """
    if saved is None:
        return None
    in_place = saved.dtype == dtype and not _get_current_graph_task_keep_graph()
    out = saved if in_place else torch.empty_like(saved, dtype=dtype)
    if saved.numel() and runs_triton(saved, factor, out):
        block = 4096
        with on_device_of(saved):
            _linear_cross_entropy_scale_kernel[(cdiv(saved.numel(), block),)](
                saved, factor, out, saved.numel(), BLOCK=block, num_warps=8
            )
        return out
    return out.copy_(saved.to(factor.dtype) * factor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        opt: _Options,
    ) -> tuple[torch.Tensor, ...]:
        # Often the moment when the most is held: what waiting layers keep can be given up for it.
        sums, rows_N, grads = with_relief(
            _forward, hidden_TH, weight_VH, bias_V, labels_T, opt, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(rows_N, *grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_TH, weight_VH, bias_V)]
        ctx.n_tokens = len(hidden_TH)
        ctx.mark_non_differentiable(*sums[1:])
        ctx.set_materialize_grads(False)  # three launches of zeros for the statistics
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # torch's once_differentiable lets a constant upstream gradient pass, and second derivatives silently be 0.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: call backward without create_graph=True")
        rows_N, *saved = ctx.saved_tensors
        hidden, weight, bias = (_scaled(t, grads[0], dtype) for t, dtype in zip(saved, ctx.dtypes, strict=True))
        if hidden is not None and rows_N is not None:
            hidden = hidden.new_zeros(ctx.n_tokens, hidden.shape[1]).index_copy_(0, rows_N, hidden)
        return hidden, weight, bias, None, None


def linear_cross_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    rows: LabelledRows | None = None,
    logits_bytes: int | None = None,
    rounded_sums: bool = False,
) -> LossSums:
    """Loss and statistics of ``softcap * tanh(scale * (hidden Wᵀ + bias) / softcap)`` against int64 labels.

    Differentiable once, in hidden, weight and bias; only what requires a gradient is computed. Under ``torch.autocast``
    it computes in autocast's dtype, as ``nn.Linear`` does. ``chunk_rows`` sets the rows held at a time, which otherwise
    follow from ``logits_bytes`` (``LOGITS_BYTES``); ``rows``, made from the same labels earlier, saves a wait for the
    device; with ``rounded_sums`` a bfloat16 dW is summed over chunks as it is, without a float32 copy: each chunk but
    the first rounds once more. Divide ``loss_sum`` by the number of items for stock's normalisation. Without a single
    label the loss is 0 and so are the gradients. A label outside [0, V) that is not ``ignore_index`` raises
    ``IndexError`` on the CPU and makes the loss and that row's gradients NaN in the kernel.
    """
    softcap = None if softcap is None else float(softcap)
    opt = _Options(float(scale), softcap, ignore_index, chunk_rows, rows, logits_bytes, rounded_sums)
    _check(hidden_TH, weight_VH, labels_T, bias_V, opt)
    tensors = (hidden_TH, weight_VH, bias_V)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return LossSums(*_LinearCrossEntropy.apply(*tensors, labels_T, opt))
    with torch.no_grad():
        return _forward(*tensors, labels_T, opt, needs=(False, False, False))[0]


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, opt: _Options
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (T, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "flatten leading dimensions with hidden.reshape(-1, hidden.shape[-1])"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64 or labels.device != hidden.device:
        raise ValueError(
            f"expected {len(hidden)} int64 labels on {hidden.device}, one a row of hidden, "
            f"got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({len(weight)},), one a row of weight, got {tuple(bias.shape)}")
    if opt.softcap is not None and opt.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no softcap; got {opt.softcap}")
    if opt.chunk_rows is not None and opt.chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None to follow from LOGITS_BYTES; got {opt.chunk_rows}")


OP = Op("linear_cross_entropy", linear_cross_entropy, reference, cases, timings)
