"""Attention over documents on a CPU: numbers, independence of neighbours, views, what reaches which kernel.

The kernels for CUDA run on meta tensors here; their numbers are in ``gpu/test_attention_documents.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from integration_tests import numbers
from sloth_kernels import attention_documents as ways
from sloth_kernels.cases.attention import documents, documents_cases, make_call
from sloth_kernels.documents import DocumentMask, Documents
from sloth_kernels.op import Case
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, OP, AttentionSpec, attention
from sloth_kernels.program import Program
from sloth_kernels.stages import Attention

CPU = torch.device("cpu")
RAGGED_OR_NOT = pytest.mark.parametrize("lengths", [(4, 2, 6), (4, 4, 4)])
CASES = [pytest.param(case, id=case.name) for case in documents_cases()]


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    op._CHOSEN.clear()
    yield
    op._CHOSEN.clear()


def _made(mask: DocumentMask) -> bool:
    """Whether a square was made."""
    return bool(mask.documents._squares)


def _call(lengths: Sequence[int], dtype: torch.dtype = torch.float32, sinks: bool = False, **spec: Any) -> numbers.Call:
    kind = "-".join(["documents", *map(str, lengths)])
    return make_call(dtype, CPU, AttentionSpec(0.3, **spec), 1, sum(lengths), (4, 2), (16, 16), kind, sinks)


def _one_by_one(q: Any, k: Any, v: Any, mask: Any, sinks: Any, *, spec: AttentionSpec) -> Tensor:
    """The definition: each document by itself, through the reference."""
    parts = zip(*(t.split(mask.documents.lengths, 2) for t in (q, k, v)), strict=True)
    return torch.cat([OP.reference(*part, None, sinks, spec=spec) for part in parts], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_documents_by_themselves(case: Case, dtype: torch.dtype) -> None:
    numbers.check(attention, _one_by_one, lambda: case.make(dtype, CPU), OP.tolerance[dtype])
    numbers.check(OP.reference, _one_by_one, lambda: case.make(dtype, CPU), OP.tolerance[dtype])


_LISTS = st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(_LISTS, st.none() | st.integers(2, 6), st.booleans())
def test_numbers_of_any_lengths(lengths: list[int], window: int | None, sinks: bool) -> None:
    numbers.check(
        attention, _one_by_one, lambda: _call(lengths, sinks=sinks, window=window), OP.tolerance[torch.float32]
    )


@RAGGED_OR_NOT
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_neighbours_do_not_show(lengths: tuple[int, ...], softcap: float | None) -> None:
    """Another document changes: outputs and gradients of the others stay equal to the bit."""
    found = []
    for other in (0.0, 5.0):
        (q, k, v, mask, _), kwargs = _call(lengths, torch.bfloat16, softcap=softcap)
        start, end = lengths[0], lengths[0] + lengths[1]
        with torch.no_grad():
            for t in (q, k, v):
                t[:, :, start:end] += other
        out = attention(q, k, v, mask, **kwargs)
        dout = torch.ones_like(out)
        dout[:, :, start:end] += other
        found.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one[:, :, :start], two[:, :, :start])
        assert torch.equal(one[:, :, end:], two[:, :, end:])
        assert not torch.equal(one[:, :, start:end], two[:, :, start:end])


@RAGGED_OR_NOT
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (None, True), (3.0, False)])
def test_functions_are_what_autograd_runs(lengths: tuple[int, ...], softcap: float | None, sinks: bool) -> None:
    (q, k, v, mask, sink), kwargs = _call(lengths, sinks=sinks, softcap=softcap, window=3)
    inputs = [t for t in (q, k, v, sink) if t is not None]
    out = attention(q, k, v, mask, sink, **kwargs)
    dout = torch.randn_like(out)
    theirs = torch.autograd.grad(out, inputs, dout)
    with torch.no_grad():
        plain, extras = op.forward(q, k, v, mask, sink, kwargs["spec"])
        ours = op.backward(dout, q, k, v, plain, extras, mask, sink, kwargs["spec"])
    assert torch.equal(plain, out)
    assert plain.transpose(1, 2).is_contiguous()
    assert not _made(mask)
    for a, b in zip([t for t in ours if t is not None], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_causal_whatever_the_spec_says() -> None:
    (q, k, v, mask, _), kwargs = _call((5, 2))
    free = AttentionSpec(0.3, causal=False)
    assert torch.equal(attention(q, k, v, mask, spec=free), attention(q, k, v, mask, **kwargs))


def test_documents_of_one_length_are_rows_of_a_batch() -> None:
    """Views: nothing is copied on the way to the kernel and back."""
    (q, k, v, mask, _), kwargs = _call((4, 4, 4))
    ((rows, _, _, none, _, _),) = ways.calls(op.inputs_of(q, k, v, mask, None, **kwargs))
    assert none is None
    assert rows.shape == (3, 4, 4, 16)
    assert rows.data_ptr() == q.data_ptr()
    assert rows.transpose(1, 2).is_contiguous()
    back = ways.together((rows,), mask.documents)
    assert (back.data_ptr(), back.shape, back.stride()[1:]) == (q.data_ptr(), q.shape, q.stride()[1:])


def test_a_choice_is_made_for_all_lengths() -> None:
    for lengths in ((3, 5), (4, 3, 1), (4, 4)):
        (q, k, v, mask, _), kwargs = _call(lengths)
        assert op.choose(q, k, v, mask, **kwargs).name == "apart"
    assert len(op._CHOSEN) == 2


def test_varlen_on_meta_tensors() -> None:
    """Arguments fit the operators' schemas; shapes, layouts and dtypes are as promised."""
    for case in (documents(7, 1, 12), documents(2, 9, 3, window=4, heads=(6, 2)), documents(7, 3, sinks=True)):
        args, kwargs = case.make(torch.bfloat16, CPU)
        q, k, v, sinks = (None if args[i] is None else args[i].detach().to("meta") for i in (0, 1, 2, 4))
        mask = DocumentMask(Documents(args[3].documents.lengths, "meta"))
        x = op.inputs_of(q, k, v, mask, sinks, **kwargs)  # type: ignore[arg-type]
        out, extras = op.run(BACKENDS["varlen"], x)
        grads = op.run_backward(BACKENDS["varlen"], torch.empty_like(out), x, out, extras)
        assert out.shape == q.shape  # type: ignore[union-attr]
        assert extras[0].dtype == torch.float32
        for grad, leaf in zip(grads, (q, k, v, sinks), strict=True):
            assert (grad is None) == (leaf is None)
            assert leaf is None or (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)  # type: ignore[union-attr]
        assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads[:3]))


@pytest.mark.parametrize(
    ("lengths", "window"),
    [((200, 1, 300), None), ((200, 1, 300), 70), ((200, 1, 300), 300), ((5, 3), None), ((128, 128, 7), 70)],
)
def test_flex_over_documents(lengths: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompiled function; blocks that are skipped are those that nobody sees."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)

    def flex(q: Any, k: Any, v: Any, mask: Any, sinks: Any, *, spec: AttentionSpec) -> Tensor:
        return op.differentiable(BACKENDS["flex_documents"], op.inputs_of(q, k, v, mask, sinks, spec))

    def make() -> numbers.Call:
        return _call(lengths, softcap=3.0, window=window)

    numbers.check(flex, OP.reference, make, OP.tolerance[torch.float32])
    documents, short = make()[0][3].documents, -sum(lengths) % ways.BLOCK
    square = F.pad(documents.seen(window)[0, 0], (0, short, 0, short)).unflatten(0, (-1, ways.BLOCK))
    some = square.unflatten(2, (-1, ways.BLOCK)).any(3).any(1)
    assert torch.equal(ways._block_mask(documents, window).to_dense()[0, 0].bool(), some)


@pytest.mark.parametrize("keep_all", [True, False])
@RAGGED_OR_NOT
def test_a_programs_attention(lengths: tuple[int, ...], keep_all: bool) -> None:
    (q, k, v, mask, _), kwargs = _call(lengths, torch.float64)
    spec = kwargs["spec"]
    program = Program([Attention("x", "k", "v", "y", 16, spec)], ("k", "v", "mask"))
    flat = [t.detach().transpose(1, 2).flatten(2) for t in (q, k, v)]
    x = flat[0].requires_grad_()
    kept = program.savable if keep_all else frozenset()
    y = program(x, {"k": flat[1], "v": flat[2], "mask": mask}, kept)
    out = _one_by_one(q, k, v, mask, None, spec=spec).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, out)
    dy = torch.randn_like(y)
    (ours,), (theirs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(out, q, dy)
    torch.testing.assert_close(ours, theirs.transpose(1, 2).flatten(2))
    assert not _made(mask)


def test_calls_that_do_not_fit() -> None:
    (q, k, v, mask, _), kwargs = _call((5, 2))
    for wrong in (
        (q[:, :, :6], k, v),
        (q, k[:, :, :6], v[:, :, :6]),
        tuple(t.expand(2, -1, -1, -1) for t in (q, k, v)),
    ):
        with pytest.raises(ValueError, match="expected B = 1 and S = T = 7, the documents' tokens"):
            attention(*wrong, mask, **kwargs)
    with pytest.raises(TypeError, match="expected one over documents"):
        op.run(BACKENDS["apart"], op.inputs_of(q, k, v, None, None, **kwargs))
