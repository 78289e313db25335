"""Attention over documents on a GPU: numbers of each way, what is chosen, independence to the bit, no wait, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from integration_tests import numbers
from sloth_kernels.cases.attention import documents, documents_cases, make_call
from sloth_kernels.documents import DocumentMask, Documents, documents_of, remember
from sloth_kernels.op import Case
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, OP, AttentionSpec, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
RAGGED, EQUAL = (300, 1, 129, 70, 2), (131, 131, 131)
LARGE = [
    documents(*RAGGED, heads=(8, 2), width=128),
    documents(*RAGGED, heads=(8, 8), width=64, window=50),
    documents(*RAGGED, heads=(6, 2), width=96, sinks=True),
    documents(*RAGGED, heads=(4, 1), width=256),
    documents(*RAGGED, heads=(8, 2), width=128, layout="fused"),
    documents(1000, 17, heads=(8, 2), width=128, window=200, sinks=True),
    documents(500, heads=(8, 2), width=128),
    documents(*EQUAL, heads=(8, 2), width=128),
    documents(*EQUAL, heads=(8, 2), width=128, window=40),
    documents(*EQUAL, heads=(8, 2), width=64, sinks=True),
]
SOFTCAP = [
    documents(*RAGGED, heads=(4, 2), width=128, softcap=3.0),
    documents(*RAGGED, heads=(6, 2), width=256, softcap=3.0, window=100),
    documents(*EQUAL, heads=(4, 2), width=128, softcap=3.0),
]


def _named(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def _call(lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16, sinks: bool = False, **spec: Any) -> Any:
    kind = "-".join(["documents", *map(str, lengths)])
    given = AttentionSpec(128**-0.5, **spec)
    return make_call(dtype, CUDA, given, 1, sum(lengths), (8, 2), (128, 128), kind, sinks)


class _Varlen(torch.autograd.Function):
    """Attention by varlen, whatever would be chosen, through run and run_backward."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, sinks: Any, spec: AttentionSpec) -> torch.Tensor:
        ctx.inputs = op.inputs_of(q, k, v, mask, sinks, spec)
        out, ctx.extras = op.run(BACKENDS["varlen"], ctx.inputs)
        ctx.out = out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv, dsinks = op.run_backward(BACKENDS["varlen"], dout, ctx.inputs, ctx.out, ctx.extras)
        return dq, dk, dv, None, dsinks, None


def _varlen(q: Any, k: Any, v: Any, mask: Any, sinks: Any, *, spec: AttentionSpec) -> torch.Tensor:
    return _Varlen.apply(q, k, v, mask, sinks, spec)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@_named([*documents_cases(), *LARGE])
def test_varlen(case: Case, dtype: torch.dtype) -> None:
    """Forced on documents of one length too; not on single tokens, which are always taken as rows."""
    args, kwargs = case.make(dtype, CUDA)
    x = op.inputs_of(*args, **kwargs)
    if what := op.refusal(BACKENDS["varlen"], x):
        pytest.skip(what)
    if args[3].documents.longest == 1:
        pytest.skip("single tokens")
    numbers.check(_varlen, OP.reference, lambda: case.make(dtype, CUDA), OP.tolerance[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@_named(LARGE)
def test_the_choice(case: Case, dtype: torch.dtype) -> None:
    (q, k, v, mask, sinks), kwargs = case.make(dtype, CUDA)
    assert op.choose(q, k, v, mask, kwargs["spec"], sinks).name == (
        "varlen" if mask.documents.equal is None else "apart"
    )
    assert attention(q, k, v, mask, sinks, **kwargs).transpose(1, 2).is_contiguous()
    assert not mask.documents._squares
    numbers.check(attention, OP.reference, lambda: case.make(dtype, CUDA), OP.tolerance[dtype])


@_named([*SOFTCAP, documents(40, 3, 9, softcap=3.0, sinks=True)])
def test_softcap(case: Case) -> None:
    """Few cases: each form compiles."""
    numbers.check(attention, OP.reference, lambda: case.make(torch.bfloat16, CUDA), OP.tolerance[torch.bfloat16])


@_named([documents(70, 3, 130, heads=(4, 2), width=64), documents(70, 3, 130, sinks=True), documents(64, 64, window=9)])
def test_float32(case: Case) -> None:
    numbers.check(attention, OP.reference, lambda: case.make(torch.float32, CUDA), OP.tolerance[torch.float32])


def test_flex_serves_new_documents_without_compiling_again() -> None:
    for lengths in ((300, 40), (200, 250, 61), (400, 100), (1, 2, 800)):
        (q, k, v, mask, _), kwargs = _call(lengths, softcap=3.0)
        attention(q, k, v, mask, **kwargs).sum().backward()
    graphs = counters["stats"]["unique_graphs"]
    (q, k, v, mask, _), kwargs = _call((77, 600, 5), softcap=3.0)
    assert op.choose(q, k, v, mask, **kwargs).name == "flex_documents"
    attention(q, k, v, mask, **kwargs).sum().backward()
    assert counters["stats"]["unique_graphs"] == graphs


# Independence, waits, memory ----------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Backward adds to dq in an order that varies otherwise, with or without neighbours."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("lengths", [(200, 90, 333), (90, 90, 90)])
def test_neighbours_do_not_show(lengths: tuple[int, ...], window: int | None, deterministic: None) -> None:
    """To the bit: outputs and every gradient by varlen, outputs by whatever is chosen."""
    start, end, found = lengths[0], lengths[0] + lengths[1], []
    for other in (0.0, 5.0):
        (q, k, v, mask, _), kwargs = _call(lengths, window=window)
        with torch.no_grad():
            for t in (q, k, v):
                t[:, :, start:end] += other
        out = _varlen(q, k, v, mask, None, **kwargs)
        dout = torch.ones_like(out)
        dout[:, :, start:end] += other
        chosen = attention(q, k, v, mask, **kwargs)
        found.append([out, chosen, *torch.autograd.grad(out, (q, k, v), dout)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one[:, :, :start], two[:, :, :start])
        assert torch.equal(one[:, :, end:], two[:, :, end:])
        assert not torch.equal(one[:, :, start:end], two[:, :, start:end])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL])
def test_no_wait_for_the_device(lengths: tuple[int, ...], sinks: bool) -> None:
    """Nor where the documents are new to this pass, and told of with ``remember``."""
    (q, k, v, mask, sink), kwargs = _call(lengths, sinks=sinks)
    attention(q, k, v, mask, sink, **kwargs).sum().backward()
    positions = torch.zeros(1, sum(lengths), dtype=torch.long, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        remember(positions, lengths)
        fresh = DocumentMask(documents_of(positions))
        attention(q, k, v, fresh, sink, **kwargs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not fresh.documents._squares


def test_memory_is_that_of_the_output() -> None:
    """No square, no copy of q, k or v: a forward takes out and the log-sum-exp."""
    for kind in ("documents-1000-24-3072", "documents-2048-2048"):
        spec = AttentionSpec(128**-0.5)
        (q, k, v, mask, _), _ = make_call(torch.bfloat16, CUDA, spec, 1, 4096, (32, 8), (128, 128), kind)
        with torch.no_grad():
            op.forward(q, k, v, mask, None, spec)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = op.forward(q, k, v, mask, None, spec)
            taken = torch.cuda.max_memory_allocated() - before
        assert kept[0].shape == q.shape
        assert taken < 1.25 * q.numel() * q.element_size()


# The mask and positions on a GPU ------------------------------------------------------------------------------------


def test_documents_on_the_device() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]], device=CUDA)
    found = documents_of(positions)
    assert found.lengths == (3, 1, 2)
    assert found.device == CUDA
    assert DocumentMask(Documents((3, 1, 2), "cuda")).device == torch.device("cuda", torch.cuda.current_device())
    assert (found.cu_seqlens.tolist(), found.cu_seqlens.device) == ([0, 3, 4, 6], CUDA)
    assert torch.equal(found.seen().cpu(), Documents((3, 1, 2), "cpu").seen())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_attention_sees_the_mask(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 4, 50, 64, dtype=dtype, device=CUDA, requires_grad=True) for _ in range(3))
    mask = DocumentMask(Documents((20, 7, 23), CUDA))
    ours, theirs = (F.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (mask, mask.dense()))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_runs_repeat_to_the_bit_where_that_is_asked_for() -> None:
    """Losses and gradients of a tiny model over ragged documents, five times over."""
    import sloth_backend
    from integration_tests import tiny
    from sloth_kernels.documents import remember

    model: Any = tiny.make_model(tiny.make_tokenizer(), hidden_size=256, num_attention_heads=4).cuda().bfloat16()
    sloth_backend.optimize(model, config={"deterministic": True, "print_report": False})
    try:
        lengths = (300, 7, 129, 64)
        ids = torch.arange(sum(lengths), device="cuda")[None] % 300
        at = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
        remember(at, lengths)
        runs = []
        for _ in range(5):
            model.zero_grad()
            loss = model(input_ids=ids, position_ids=at, labels=ids).loss
            loss.backward()
            runs.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for run in runs[1:]:
            assert all(map(torch.equal, run, runs[0]))
    finally:
        sloth_backend.undo(model)
