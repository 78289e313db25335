"""Attention over documents, rows laid end to end (``documents.Documents``): causal or windowed within each.

Three ways beside writing the mask out:

- apart: ordinary calls without a mask, each by the kernel that is chosen for it. Documents of one length L are one call
  whose rows are views, (1, H, T, D) as (n, H, L, D); documents of several lengths are one call each, so that a
  document's numbers do not depend on its neighbours by a bit. It serves every device, dtype, softcap and sink;
- varlen: one kernel for documents of any lengths, FlashAttention-2 (Dao, arXiv:2307.08691), the one inside torch,
  which takes (T, H, D) and where each document begins. CUDA, 16-bit. Nothing waits for the device;
- flex_documents: FlexAttention, for softcaps over documents of several lengths on CUDA: one compiled function, told of
  the documents by a BlockMask that is made once for them, on the host.

Shapes: q (1, Hq, T, D), k (1, Hk, T, D), v (1, Hk, T, E), out (1, Hq, T, E) in (1, T, Hq, E) memory.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sloth_kernels import attention_backends as kernels
from sloth_kernels.attention_inputs import AttentionSpec, Inputs
from sloth_kernels.documents import DocumentMask, Documents
from sloth_kernels.launch import cdiv

aten = torch.ops.aten
Forward = Callable[..., tuple[Tensor, tuple[Any, ...]]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def documents_in(x: Inputs) -> Documents:
    """The documents of a call over documents; ``TypeError`` for any other."""
    if not isinstance(x.mask, DocumentMask):
        raise TypeError(f"attention: a call of form {x.form}; expected one over documents: its mask a DocumentMask")
    return x.mask.documents


# Apart --------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def causal(spec: AttentionSpec) -> AttentionSpec:
    """The spec of one document without a mask: the mask of documents is causal whatever the spec says."""
    return spec if spec.causal else dataclasses.replace(spec, causal=True)


def apart(documents: Documents, x: Tensor) -> Sequence[Tensor]:
    """Views of ``x`` (1, H, T, D): one (n, H, L, D) of documents of one length L, else a (1, H, length, D) of each."""
    if documents.equal is None:
        return x.split(documents.lengths, 2)
    return (x.view(x.shape[1], -1, documents.equal, x.shape[3]).transpose(0, 1),)


def together(parts: Sequence[Tensor], documents: Documents) -> Tensor:
    """What ``apart`` took apart, (1, H, T, D): a view where documents have one length and lie token by token."""
    if documents.equal is None:
        return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
    (rows,) = parts
    return rows.transpose(0, 1).reshape(1, rows.shape[1], documents.tokens, rows.shape[3])


def calls(x: Inputs) -> Iterator[tuple[Any, ...]]:
    """(q, k, v, no mask, sinks, spec) of the ordinary calls that ``x`` comes apart into."""
    documents, spec = documents_in(x), causal(x.spec)
    for q, k, v in zip(*(apart(documents, t) for t in (x.q, x.k, x.v)), strict=True):
        yield q, k, v, None, x.sinks, spec


def forward_apart(x: Inputs, forward: Forward) -> tuple[Tensor, tuple[Any, ...]]:
    """out and each call's extras; ``forward`` computes an ordinary call."""
    outs, extras = zip(*(forward(*call) for call in calls(x)), strict=True)
    return together(outs, documents_in(x)), extras


def backward_apart(
    dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...], backward: Backward
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks; ``backward`` computes an ordinary call's, given dout, q, k, v, out, extras and so on."""
    documents = documents_in(x)
    of_each = zip(calls(x), apart(documents, dout), apart(documents, out), extras, strict=True)
    grads = [backward(d, q, k, v, o, e, *rest) for (q, k, v, *rest), d, o, e in of_each]
    dq, dk, dv, dsinks = zip(*grads, strict=True)
    total = None if x.sinks is None else functools.reduce(torch.add, dsinks)
    return together(dq, documents), together(dk, documents), together(dv, documents), total


# Varlen -------------------------------------------------------------------------------------------------------------


def _pattern(x: Inputs, documents: Documents) -> tuple[bool, dict[str, int]]:
    """Whether it is causal without a window, and the window: keys to the left of the query's own."""
    if x.spec.window is None or x.spec.window >= documents.longest:
        return True, {}
    return False, {"window_size_left": x.spec.window - 1, "window_size_right": 0}


def varlen_forward(x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """out and (log-sum-exp (Hq, T), dropout's state)."""
    documents = documents_in(x)
    is_causal, window = _pattern(x, documents)
    q, k, v = (t[0].transpose(0, 1) for t in (x.q, x.k, x.v))
    begins, longest = documents.cu_seqlens, documents.longest
    out, lse, rng, unused, _ = aten._flash_attention_forward(
        q, k, v, begins, begins, longest, longest, x.spec.dropout, is_causal, False, scale=x.spec.scale, **window
    )
    return out.transpose(0, 1)[None], (lse, rng, unused)


def varlen_backward(dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    documents, (lse, rng, unused) = documents_in(x), extras
    is_causal, window = _pattern(x, documents)
    dout, q, k, v, out = (t[0].transpose(0, 1) for t in (dout, x.q, x.k, x.v, out))
    begins, longest = documents.cu_seqlens, documents.longest
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, begins, begins, longest, longest, x.spec.dropout, is_causal, rng, unused,
        scale=x.spec.scale, **window,
    )  # fmt: skip
    return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None]


# FlexAttention ------------------------------------------------------------------------------------------------------

BLOCK = 128
"""Queries, and keys, of a block of a BlockMask."""

_BLOCKS: WeakKeyDictionary[Documents, dict[int | None, Any]] = WeakKeyDictionary()
"""Documents -> window -> BlockMask: the layers of a pass share it."""


def first_blocks(documents: Documents, window: int | None) -> list[int]:
    """The first block of keys that some query of each block of queries sees; the last one is its own."""
    begins = [0]
    for length in documents.lengths:
        begins.append(begins[-1] + length)
    firsts = []
    for query in range(0, documents.tokens, BLOCK):
        begin = begins[bisect.bisect_right(begins, query) - 1]
        firsts.append((begin if window is None else max(begin, query - window + 1)) // BLOCK)
    return firsts


def _block_mask(documents: Documents, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    ids, blocks = documents.ids, torch.arange(cdiv(documents.tokens, BLOCK), dtype=torch.int32)
    first = torch.tensor(first_blocks(documents, window), dtype=torch.int32)
    indices = (first[:, None] + blocks).clamp_(max=len(blocks) - 1)
    counts, indices = (documents.placed(t[None, None]) for t in (blocks - first + 1, indices))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (ids[i] == ids[j]) & (j <= i)
        return inside if window is None else inside & (i - j < window)

    lengths = (documents.tokens, documents.tokens)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=lengths)


def flex_documents(x: Inputs) -> Tensor:
    """out by FlexAttention."""
    documents, window = documents_in(x), x.spec.window
    known = _BLOCKS.setdefault(documents, {})
    if window not in known:
        known[window] = _block_mask(documents, window)
    return kernels.flex(x._replace(mask=None), known[window])
