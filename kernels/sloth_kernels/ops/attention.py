"""Softmax attention (Vaswani et al., arXiv:1706.03762, eq. 1) of grouped heads, by the fastest kernel that takes it.

    s = c(scale q kᵀ) + mask        p_ij = exp(s_ij) / (Σ_j exp(s_ij) + exp(sink_h))        out = p v
    c is the identity, or softcap tanh(· / softcap) (Gemma 2, arXiv:2408.00118)

A sink (gpt-oss) is one more key with score sink_h and value 0; kernels need not know of it (``attention_sinks``).

Shapes: q (B, Hq, S, D), k (B, Hk, T, D), v (B, Hk, T, E), Hq a multiple of Hk, out (B, Hq, S, E); sinks (Hq,). Mask:
None, bool (True: seen) or numbers to add, broadcastable to (B, Hq, S, T). Without one, ``spec`` says what is seen;
causal and T > S: the first query stands at the first key, as torch has it. A ``DocumentMask`` is never written out:
documents of one length are taken as a batch of rows, others by a kernel that takes lengths or, where none does, one by
one (``attention_documents``).
Layouts: any; tensors whose memory is (B, S, H, D) are not copied, and out, dq, dk and dv are laid out so.
Dtypes: float16 and bfloat16 on every kernel, float32 and float64 on some; scores and sums are float32 or more.
A row that a bool mask hides entirely gives zeros, except in cuDNN, which leaves it unmasked; neither gives NaN.

Left out: gradients of the mask (``attention`` takes the reference then); causal windows with a given mask, which says
everything; second derivatives where a kernel is functional (they raise).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth_kernels import attention_backends as kernels
from sloth_kernels import attention_documents as ways
from sloth_kernels.attention_backends import Backend, token_major
from sloth_kernels.attention_inputs import AttentionSpec, Inputs, band, check_fit, inputs_of, mask_form, written
from sloth_kernels.attention_sinks import add_sinks, sink_gradient
from sloth_kernels.cases.attention import cases, timings
from sloth_kernels.documents import DocumentMask
from sloth_kernels.op import Op


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, *, spec: AttentionSpec
) -> Tensor:
    """What the models' eager attention computes, softmax in float32 (float64 stays); a row without keys gives zeros."""
    if isinstance(mask, DocumentMask):
        mask = mask.documents.seen(spec.window)
    elif mask is None and spec.causal:
        mask = band(q, k, spec)
    k, v = kernels.repeated(k, q.shape[1]), kernels.repeated(v, q.shape[1])
    scores = q @ k.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = _softmax(scores, sinks).to(v.dtype)
    return F.dropout(probabilities, spec.dropout) @ v


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        return torch.ops.aten._safe_softmax(scores, -1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


_ALL, _HALF_AND_FLOAT = ("full", "causal", "window", "mask"), (torch.float16, torch.bfloat16, torch.float32)
_FLOATS, _DOCUMENTS = (*_HALF_AND_FLOAT, torch.float64), ("rows", "documents")

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend(
                "cudnn", ("cuda",), ("full", "causal", "mask"), kernels.cudnn_forward, kernels.cudnn_backward,
                allows=kernels.cudnn_allows, grouped=True, dropout=True, sinks=True, head_multiple=8,
                max_head=128,
            ),
            Backend(
                "flash", ("cuda",), ("full", "causal", "window"), kernels.flash_forward, kernels.flash_backward,
                allows=kernels.torch_allows("flash"), grouped=True, dropout=True, sinks=True, head_multiple=8,
                max_head=256, same_heads=True,
            ),
            Backend(
                "varlen", ("cuda",), _DOCUMENTS, ways.varlen_forward, ways.varlen_backward,
                allows=kernels.torch_allows("flash"), grouped=True, dropout=True, sinks=True, head_multiple=8,
                max_head=256, same_heads=True,
            ),
            Backend(
                "flex_documents", ("cuda",), _DOCUMENTS, differentiable=ways.flex_documents,
                allows=lambda x: x.spec.softcap is not None, grouped=True, softcap=True, dtypes=_HALF_AND_FLOAT,
                max_head=256,
            ),
            Backend(
                "apart", (), _DOCUMENTS, grouped=True, dropout=True, softcap=True, sinks=True, dtypes=_FLOATS,
                apart=True,
            ),
            Backend(
                "efficient", ("cuda",), ("full", "causal", "mask"), kernels.efficient_forward,
                kernels.efficient_backward, allows=kernels.torch_allows("efficient"), dropout=True, sinks=True,
                dtypes=_HALF_AND_FLOAT, head_multiple=8,
            ),
            Backend(
                "cpu", ("cpu",), ("full", "causal", "mask"), kernels.cpu_forward, kernels.cpu_backward, sinks=True,
                dtypes=_FLOATS, same_heads=True,
            ),
            Backend(
                "flash4", ("cuda",), ("full", "causal", "window"), differentiable=kernels.flash4,
                allows=kernels.flash4_allows, grouped=True, head_multiple=8, max_head=128, same_heads=True,
            ),
            Backend(
                "flex", ("cuda",), _ALL, differentiable=kernels.flex, grouped=True, softcap=True,
                dtypes=_HALF_AND_FLOAT, max_head=256,
            ),
            Backend(
                "sdpa", (), ("full", "causal", "mask"), differentiable=kernels.sdpa, dropout=True, dtypes=_FLOATS
            ),
            Backend(
                "eager", (), _ALL, differentiable=lambda x: reference(*x[:5], spec=x.spec), grouped=True, dropout=True,
                softcap=True, sinks=True, dtypes=_FLOATS,
            ),
        )
    }
)  # fmt: skip
"""Every kernel; an empty ``devices`` means any."""

_UNMASKED = ("cudnn", "flash4", "flash", "efficient", "sdpa", "flex", "eager")
PREFERENCE: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("cuda", "full"): _UNMASKED,
        ("cuda", "causal"): _UNMASKED,
        ("cuda", "window"): ("flash4", "flash", "flex", "efficient", "sdpa", "eager"),
        ("cuda", "mask"): ("efficient", "cudnn", "sdpa", "flex", "eager"),
        ("cuda", "rows"): ("apart", "eager"),
        ("cuda", "documents"): ("varlen", "flex_documents", "apart", "eager"),
    }
)
"""(device, form) -> backends, the fastest first (``integration_tests/benchmarks/attention.py`` measures them)."""
ELSEWHERE = ("cpu", "sdpa", "eager")
DOCUMENTS_ELSEWHERE = ("apart", "eager")


class Graph(NamedTuple):
    """The extras of a differentiable backend: what autograd recorded. It holds memory and serves one backward."""

    out: Tensor
    leaves: list[Tensor]


# Choosing -----------------------------------------------------------------------------------------------------------


def refusal(backend: Backend, x: Inputs) -> str | None:
    """What of the call ``backend`` does not take, or None where it takes it."""
    heads = x.q.shape[3], x.v.shape[3]
    checks = (
        (not backend.devices or x.q.device.type in backend.devices, f"device {x.q.device.type}"),
        (x.form in backend.forms or "mask" in backend.forms, f"form {x.form}"),
        (x.q.dtype in backend.dtypes, f"dtype {x.q.dtype}"),
        (backend.softcap or x.spec.softcap is None, "softcap"),
        (backend.sinks or x.sinks is None, "sinks"),
        (backend.dropout or not x.spec.dropout, "dropout"),
        (max(heads) <= backend.max_head and not any(n % backend.head_multiple for n in heads), f"heads of {heads}"),
        (not backend.same_heads or heads[0] == heads[1], f"heads of {heads}"),
        (backend.name == "eager" or min(x.q.numel(), x.k.numel(), x.v.numel()) > 0, "an empty tensor"),
    )
    for holds, what in checks:
        if not holds:
            return what
    return None if backend.allows(_probe(backend, x)) else "torch, the device or a package"


def _probe(backend: Backend, x: Inputs) -> Inputs:
    """The sizes that ``backend`` would read, in tensors of one row: strides must not decide for a form of call."""
    q_heads, heads = x.q.shape[1], x.k.shape[1] if backend.grouped else x.q.shape[1]
    sizes = ((x.q, q_heads), (x.k, heads), (x.v, heads))
    q, k, v = (t.new_empty(t.shape[3]).expand(t.shape[0], n, *t.shape[2:]) for t, n in sizes)
    return Inputs(q, k, v, None, None, x.spec, x.form if x.form in backend.forms else "mask")


_CHOSEN: dict[tuple[Any, ...], Backend] = {}
"""What was chosen for a form of call, so that a backward meets its forward's backend. Emptied when it grows long."""


def choose(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, sinks: Tensor | None = None
) -> Backend:
    """The first backend of ``PREFERENCE`` that takes the call; the same for all calls of its form.

    Values are not looked at; torch's switch for deterministic algorithms is. Raises ``ValueError`` for shapes, dtypes
    or devices that do not fit one another.
    """
    form = (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, spec,
        None if mask is None else (mask.shape, mask.dtype, mask.device, mask_form(mask)),
        None if sinks is None else (sinks.shape, sinks.device), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    chosen = _CHOSEN.get(form)
    if chosen is None:
        check_fit(q, k, v, mask, sinks)
        if len(_CHOSEN) >= 4096:
            _CHOSEN.clear()
        chosen = _CHOSEN[form] = _first(inputs_of(q, k, v, mask, sinks, spec))
    return chosen


def _first(x: Inputs) -> Backend:
    elsewhere = DOCUMENTS_ELSEWHERE if x.form in _DOCUMENTS else ELSEWHERE
    names = PREFERENCE.get((x.q.device.type, x.form), elsewhere)
    return next((BACKENDS[name] for name in names if refusal(BACKENDS[name], x) is None), BACKENDS["eager"])


def prepared(backend: Backend, x: Inputs) -> Inputs:
    """The call as ``backend`` reads it: other masks written out, key heads repeated, layouts that it can walk."""
    q, k, v, mask, form = x.q, x.k, x.v, x.mask, x.form
    if form not in backend.forms:
        mask, form = written(x), "mask"
    if not backend.grouped:
        k, v = kernels.repeated(k, q.shape[1]), kernels.repeated(v, q.shape[1])
    if backend.forward is not None:
        q, k, v = kernels.walkable(q), kernels.walkable(k), kernels.walkable(v)
    return Inputs(q, k, v, mask, x.sinks, x.spec, form)


# Forward and backward -----------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, tuple[Any, ...]]:
    """out (B, Hq, S, E) in (B, S, Hq, E) memory, and the extras that ``backward`` needs.

    Extras of a functional backend are tensors or None, the first the log-sum-exp in float32; a differentiable one's are
    a ``Graph``; those of documents taken apart are the extras of each call. Call it where autograd is off.
    """
    return run(choose(q, k, v, mask, spec, sinks), inputs_of(q, k, v, mask, sinks, spec))


def run(backend: Backend, x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    """``forward`` by a given backend."""
    if backend.apart:
        return ways.forward_apart(x, forward)
    if backend.forward is None:
        return _record(backend, x)
    out, extras = backend.forward(prepared(backend, x))
    if x.sinks is not None:
        out, extras = add_sinks(out, extras, x.sinks)
    return token_major(out), extras


def _record(backend: Backend, x: Inputs) -> tuple[Tensor, tuple[Any, ...]]:
    q, k, v = leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    sinks = None if x.sinks is None else x.sinks.detach().requires_grad_()
    with torch.enable_grad():
        out = differentiable(backend, x._replace(q=q, k=k, v=v, sinks=sinks))
    return out.detach(), (Graph(out, leaves if sinks is None else [*leaves, sinks]),)


def differentiable(backend: Backend, x: Inputs) -> Tensor:
    """out by a backend that autograd follows."""
    if backend.apart:
        parts = [attention(*call[:-1], spec=call[-1]) for call in ways.calls(x)]
        return ways.together(parts, ways.documents_in(x))
    if backend.differentiable is None:
        raise ValueError(f"attention: autograd cannot follow backend {backend.name}; call run and run_backward")
    return token_major(backend.differentiable(prepared(backend, x)))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    extras: tuple[Any, ...],
    mask: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks, each in its input's shape and dtype; ``out`` and ``extras`` as ``forward`` returned them."""
    inputs = inputs_of(q, k, v, mask, sinks, spec)
    return run_backward(choose(q, k, v, mask, spec, sinks), dout, inputs, out, extras)


def run_backward(
    backend: Backend, dout: Tensor, x: Inputs, out: Tensor, extras: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``backward`` by a given backend."""
    if backend.apart:
        return ways.backward_apart(dout, x, out, extras, backward)
    if backend.backward is None:
        (graph,) = extras
        dq, dk, dv, *rest = torch.autograd.grad(graph.out, graph.leaves, dout)
        return dq, dk, dv, rest[0] if rest else None
    dout, heads = kernels.walkable(dout), x.k.shape[1]
    dq, dk, dv = backend.backward(dout, prepared(backend, x), out, extras)
    dsinks = None if x.sinks is None else sink_gradient(dout, out, extras[0], x.sinks)
    return dq, kernels.grouped_sum(dk, heads), kernels.grouped_sum(dv, heads), dsinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, spec: AttentionSpec
    ) -> Tensor:
        out, extras = forward(q, k, v, mask, sinks, spec)
        # Hooks on what autograd saves would write a mask of documents out.
        ctx.documents = mask if isinstance(mask, DocumentMask) else None
        ctx.save_for_backward(q, k, v, mask if ctx.documents is None else None, sinks, out, *extras)
        ctx.spec = spec
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, sinks, out, *extras = ctx.saved_tensors
        mask = mask if ctx.documents is None else ctx.documents
        dq, dk, dv, dsinks = backward(dout, q, k, v, out, tuple(extras), mask, sinks, ctx.spec)
        return dq, dk, dv, None, dsinks, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, *, spec: AttentionSpec
) -> Tensor:
    """out (B, Hq, S, E) for q (B, Hq, S, D), k (B, Hk, T, D), v (B, Hk, T, E), and a mask or sinks (Hq,) where given.

    Raises ``ValueError`` for shapes, dtypes or devices that do not fit one another.
    """
    backend = choose(q, k, v, mask, spec, sinks)
    if mask is not None and mask.requires_grad:
        return token_major(reference(q, k, v, mask, sinks, spec=spec))
    if backend.differentiable is not None or backend.apart:
        return differentiable(backend, inputs_of(q, k, v, mask, sinks, spec))
    return _Attention.apply(q, k, v, mask, sinks, spec)


OP = Op("attention", attention, reference, cases, timings, launches=False)
