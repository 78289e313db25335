"""The kernels that compute attention, each behind one small interface, and how a mask is put to them.

A functional backend is a pair: ``forward`` returns the output and the extras that ``backward`` needs beside the inputs
and the output; extras[0] is the log-sum-exp of every row of scores (natural, float32), the rest is the state of
dropout's generator, a few bytes on either device. Neither uses autograd. A differentiable backend is one function that
autograd follows.

Shapes: q (B, Hq, S, D), k (B, Hk, T, D), v (B, Hk, T, E), mask broadcastable to (B, Hq, S, T), out (B, Hq, S, E).
The ways of documents, rows laid end to end, are in ``attention_documents``.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sloth_kernels.attention_inputs import Inputs
from sloth_kernels.launch import cdiv

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]

CUDNN_MASKED = -65504.0
"""What torch adds to a masked score for cuDNN, whose kernels do not take -inf: float16's least number."""


@dataclass(frozen=True)
class Backend:
    """A kernel and what it takes; ``allows`` is torch's own say on the tensors and the device.

    ``forms``: the masks it knows; the others are written out for one that knows "mask". ``grouped``: it reads the Hk
    key heads as they are; for others they are repeated. ``head_multiple`` and ``max_head`` bound D and E. ``apart``:
    it is no kernel, but cuts documents into ordinary calls, for which backends are chosen anew.
    """

    name: str
    devices: tuple[str, ...]
    forms: tuple[str, ...]
    forward: Callable[[Inputs], tuple[Tensor, tuple[Any, ...]]] | None = None
    backward: Callable[[Tensor, Inputs, Tensor, tuple[Any, ...]], Gradients] | None = None
    differentiable: Callable[[Inputs], Tensor] | None = None
    allows: Callable[[Inputs], bool] = lambda inputs: True
    grouped: bool = False
    dropout: bool = False
    softcap: bool = False
    sinks: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    head_multiple: int = 1
    max_head: int = 2**31
    same_heads: bool = False
    apart: bool = False


# Layouts and masks --------------------------------------------------------------------------------------------------


def token_major(x: Tensor) -> Tensor:
    """``x`` (B, H, S, D) itself where its memory is (B, S, H, D), or a copy that is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def walkable(x: Tensor) -> Tensor:
    """``x`` (B, H, S, D), or a copy that kernels can walk: contiguous heads, none repeated, 16-byte aligned on CUDA."""
    step = 16 // x.element_size() if x.is_cuda else 1
    batches, heads, rows, elements = x.stride()
    apart = batches and heads and rows
    # step is a power of two: the bits of all of them together tell whether each is a multiple
    if apart and elements == 1 and (x.storage_offset() | batches | heads | rows) % step == 0:
        return x
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """``x`` (B, Hk, T, D) with each head standing for its group of queries, (B, heads, T, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def grouped_sum(dx: Tensor, heads: int) -> Tensor:
    """The gradient of ``repeated``'s input, (B, heads, T, D) in (B, T, heads, D) memory."""
    return dx if dx.shape[1] == heads else dx.transpose(1, 2).unflatten(2, (heads, -1)).sum(3).transpose(1, 2)


_BIASES = WeakTensorKeyDictionary()
"""Mask -> its additive forms: a model hands one mask to all of its layers, which share what is made of it."""


def additive(inputs: Inputs, masked: float = -math.inf, multiple: int = 1) -> Tensor | None:
    """The mask as numbers of q's dtype to add to the scores, a view (B, Hq, S, T), or None without one.

    ``masked`` is the least number, rows lie a multiple of ``multiple`` apart. Made once for a mask, and kept while it
    lives; values are not looked at.
    """
    mask, q = inputs.mask, inputs.q
    if mask is None:
        return None
    version = None if mask.is_inference() else mask._version
    key = q.dtype, masked, multiple, version
    known = _BIASES.get(mask) or {}
    if key not in known:
        known = {key: _additive(mask, inputs.k.shape[2], q.dtype, masked, multiple)}
        _BIASES[mask] = known
    return known[key].expand(q.shape[0], q.shape[1], q.shape[2], -1)


def _additive(mask: Tensor, keys: int, dtype: torch.dtype, masked: float, multiple: int) -> Tensor:
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.expand(*mask.shape[:3], keys)
    rows = mask.new_zeros(*mask.shape[:3], cdiv(keys, multiple) * multiple, dtype=dtype)
    bias = rows[..., :keys]
    if mask.dtype == torch.bool:
        return bias.masked_fill_(mask.logical_not(), masked)
    return bias.copy_(mask.clamp(min=masked))


# Functional kernels -------------------------------------------------------------------------------------------------


def _cudnn_query(q: Tensor) -> Tensor:
    """The output takes q's layout, and the plan that torch caches for a backward takes for granted that it did."""
    return q if q.stride(1) <= q.stride(2) else token_major(q)


def cudnn_forward(x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """cuDNN's fused attention, as torch's SDPA calls it."""
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        _cudnn_query(x.q), x.k, x.v, additive(x, CUDNN_MASKED), True, x.spec.dropout, x.causal, False,
        scale=x.spec.scale,
    )  # fmt: skip
    return out, (lse, seed, offset)


def _in_layout_of(out: Tensor, dout: Tensor) -> Tensor:
    """torch keeps a plan of cuDNN's by the layouts of q, k and v alone: whoever comes second with another dout gets
    numbers from the wrong places. So all have the one of ``out``, as stock's do."""
    return dout if dout.stride() == out.stride() else torch.empty_like(out).copy_(dout)


def cudnn_backward(dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]) -> Gradients:
    dout = _in_layout_of(out, dout)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, _cudnn_query(x.q), x.k, x.v, out, *extras, additive(x, CUDNN_MASKED), None, None,
        x.q.shape[2], x.k.shape[2], x.spec.dropout, x.causal, scale=x.spec.scale,
    )  # fmt: skip


def _flash_window(x: Inputs) -> dict[str, int]:
    """Flash counts the keys to the left of the query's own."""
    if x.form != "window" or x.spec.window is None:
        return {}
    return {"window_size_left": x.spec.window - 1, "window_size_right": 0}


def flash_forward(x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """FlashAttention-2 (Dao, arXiv:2307.08691), the one inside torch, which takes (B, S, H, D) and windows."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    out, lse, rng, unused, _ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], x.spec.dropout, x.causal, False,
        scale=x.spec.scale, **_flash_window(x),
    )  # fmt: skip
    return out.transpose(1, 2), (lse, rng, unused)


def flash_backward(dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]) -> Gradients:
    lse, rng, unused = extras
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, x.q, x.k, x.v, out))
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], x.spec.dropout, x.causal, rng, unused,
        scale=x.spec.scale, **_flash_window(x),
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def efficient_forward(x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """Memory-efficient attention (Rabe and Staats, arXiv:2112.05682), the CUTLASS one inside torch."""
    out, *extras = aten._scaled_dot_product_efficient_attention(
        x.q, x.k, x.v, additive(x, multiple=16), True, x.spec.dropout, x.causal, scale=x.spec.scale
    )
    return out, tuple(extras)


def efficient_backward(dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]) -> Gradients:
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, x.q, x.k, x.v, additive(x, multiple=16), out, *extras, x.spec.dropout, [True, True, True, False],
        x.causal, scale=x.spec.scale,
    )  # fmt: skip
    return dq, dk, dv


def cpu_forward(x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """torch's flash attention for CPUs."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        x.q, x.k, x.v, 0.0, x.causal, attn_mask=additive(x), scale=x.spec.scale
    )
    return out, (lse,)


def cpu_backward(dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]) -> Gradients:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, x.q, x.k, x.v, out, *extras, 0.0, x.causal, attn_mask=additive(x), scale=x.spec.scale
    )


def cudnn_allows(x: Inputs) -> bool:
    """Before 9.15.1 cuDNN errs where a length is no multiple of 128 (torch's issue 169849)."""
    lengths_fit = x.q.shape[2] % 128 == x.k.shape[2] % 128 == 0
    return torch_allows("cudnn")(x) and (lengths_fit or (torch.backends.cudnn.version() or 0) >= 91501)


def torch_allows(name: str) -> Callable[[Inputs], bool]:
    """torch's own check of device, versions, sizes and what the user switched off, for a ``name`` of its kernels.

    The mask is left out, as it comes prepared.
    """
    check = getattr(torch.backends.cuda, f"can_use_{name}_attention")

    def allows(x: Inputs) -> bool:
        q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
        return check(torch.backends.cuda.SDPAParams(q, k, v, None, x.spec.dropout, x.causal, k.shape[1] != q.shape[1]))

    return allows


# Differentiable kernels ---------------------------------------------------------------------------------------------


def sdpa(x: Inputs) -> Tensor:
    """torch's own choice; it takes shapes that no single kernel does."""
    return F.scaled_dot_product_attention(
        x.q, x.k, x.v, x.mask if x.mask is None or x.mask.dtype == torch.bool else x.mask.to(x.q.dtype),
        x.spec.dropout, x.causal, scale=x.spec.scale, enable_gqa=x.k.shape[1] != x.q.shape[1],
    )  # fmt: skip


@functools.cache
def flash4_function() -> Callable[..., Any] | None:
    """FlashAttention-4's function where the package is installed (its module is ``flash_attn.cute``)."""
    try:
        return importlib.import_module("flash_attn.cute").flash_attn_func
    except (ImportError, AttributeError):
        return None


def flash4_allows(x: Inputs) -> bool:
    """16-bit heads up to 128 on Hopper and data-centre Blackwell, as torch registers it."""
    return flash4_function() is not None and torch.cuda.get_device_capability(x.q.device)[0] in (9, 10)


def flash4(x: Inputs) -> Tensor:
    """FlashAttention-4 through its public function, which takes (B, S, H, D)."""
    function = flash4_function()
    if function is None:
        raise RuntimeError("attention: flash4 was chosen but flash_attn.cute is not installed; install flash-attn-4")
    window = (x.spec.window - 1, 0) if x.form == "window" and x.spec.window is not None else (None, None)
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    out = function(q, k, v, softmax_scale=x.spec.scale, causal=x.form != "full", window_size=window)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@functools.cache
def _flex_function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@functools.lru_cache(maxsize=8)
def _flex_blocks(form: str, window: int | None, queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i if window is None else (j <= i) & (i - j < window)

    return None if form in ("full", "mask") else create_block_mask(seen, None, None, queries, keys, device=device)


def _flex_scores(softcap: float | None, mask: Tensor | None) -> Callable[..., Tensor]:
    def scores(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if mask is None:
            return score
        if mask.dtype == torch.bool:
            return torch.where(mask[b, h, i, j], score, -math.inf)
        return score + mask[b, h, i, j]

    return scores


def flex(x: Inputs, blocks: Any = None) -> Tensor:
    """FlexAttention (Dong et al., arXiv:2412.05496): softcap and windows; compiled on a form's first call on CUDA.

    ``blocks`` is the BlockMask of another pattern than the call's form.
    """
    q, k, v = x.q, x.k, x.v
    mask = None if x.mask is None else x.mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    group = q.shape[1] // k.shape[1]
    if group & (group - 1):  # its kernels take groups that are powers of two
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    if blocks is None:
        blocks = _flex_blocks(x.form, x.spec.window, q.shape[2], k.shape[2], q.device)
    return _flex_function(q.is_cuda)(
        q, k, v, _flex_scores(x.spec.softcap, mask), blocks, scale=x.spec.scale, enable_gqa=k.shape[1] != q.shape[1]
    )
