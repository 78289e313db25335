"""Documents: the mask that is never written out, and positions that tell of documents."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sloth_kernels import documents as module
from sloth_kernels.documents import DocumentMask, Documents, documents_of, remember

CPU = torch.device("cpu")
LENGTHS = (3, 1, 4)


@pytest.fixture
def mask() -> DocumentMask:
    return DocumentMask(Documents(LENGTHS, CPU))


def _square(lengths: Sequence[int], window: int | None = None) -> list[list[bool]]:
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    return [
        [a == b and j <= i and (window is None or i - window < j) for j, b in enumerate(document)]
        for i, a in enumerate(document)
    ]


def _positions(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _made(mask: DocumentMask) -> bool:
    """Whether a square was made."""
    return bool(mask.documents._squares)


# Documents ----------------------------------------------------------------------------------------------------------


def test_documents() -> None:
    ragged, equal = Documents(LENGTHS, "cpu"), Documents([5, 5], CPU)
    assert (ragged.lengths, ragged.tokens, ragged.longest, ragged.equal) == (LENGTHS, 8, 4, None)
    assert (equal.tokens, equal.longest, equal.equal) == (10, 5, 5)
    assert ragged.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert ragged.cu_seqlens.dtype == torch.int32
    assert ragged.cu_seqlens is ragged.cu_seqlens
    assert ragged.ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("lengths", "message"), [((), "no lengths"), ((3, 0), "a length of 0"), ((-1,), "of -1")])
def test_documents_that_are_none(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; expected one document or more"):
        Documents(lengths, CPU)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.none() | st.integers(1, 10))
def test_what_is_seen(lengths: list[int], window: int | None) -> None:
    found = Documents(lengths, CPU)
    assert found.seen(window)[0, 0].tolist() == _square(lengths, window)
    assert found.seen(window) is found.seen(window)
    assert documents_of(_positions(lengths)).lengths == tuple(lengths)


# The mask without memory --------------------------------------------------------------------------------------------


def test_reading_makes_nothing(mask: DocumentMask) -> None:
    assert isinstance(mask, Tensor)
    assert mask.shape == (1, 1, 8, 8)
    assert len(mask.shape) == mask.ndim == mask.dim() == 4
    assert (mask.dtype, mask.device, mask.numel(), mask.size(-1)) == (torch.bool, CPU, 64, 8)
    assert not mask.requires_grad
    assert not mask.is_floating_point()
    assert "3, 1, 4" in repr(mask)
    large = DocumentMask(Documents([10**6] * 3, CPU))
    assert large.shape[-1] == 3 * 10**6
    assert not _made(mask)


def test_what_hands_it_on_keeps_it(mask: DocumentMask) -> None:
    handed = [
        copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.detach(), mask.to("cpu"),
        mask.to(torch.bool), mask.contiguous(), mask[:, :, :, :8],
    ]  # fmt: skip
    assert all(isinstance(other, DocumentMask) and other.documents.lengths == LENGTHS for other in handed)
    assert not _made(mask)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_hands_it_on(use_reentrant: bool, mask: DocumentMask) -> None:
    seen = []

    def layer(x: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return x * x

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, mask, use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 2
    assert all(isinstance(given, DocumentMask) and given.documents is mask.documents for given in seen)
    assert not _made(mask)


def test_whatever_computes_sees_the_mask(mask: DocumentMask) -> None:
    square = torch.tensor(_square(LENGTHS))[None, None]
    scores = torch.randn(1, 2, 8, 8)
    found = {
        "not": (mask.logical_not(), ~square),
        "invert": (~mask, ~square),
        "slice": (mask[..., 2:5], square[..., 2:5]),
        "float": (mask.float(), square.float()),
        "where": (torch.where(mask, scores, 0.0), torch.where(square, scores, 0.0)),
        "masked_fill": (scores.masked_fill(~mask, -1.0), scores.masked_fill(~square, -1.0)),
        "sum": (mask.sum(-1), square.sum(-1)),
        "int sum": (mask + 1, square + 1),
        "cat": (torch.cat([mask, square]), torch.cat([square, square])),
        "clone": (mask.clone(), square),
        "expand": (mask.expand(2, 3, 8, 8), square.expand(2, 3, 8, 8)),
    }
    for name, (ours, theirs) in found.items():
        assert type(ours) is Tensor, name
        assert torch.equal(ours, theirs), name
    assert torch.equal(mask, square)
    assert mask.dense() is mask.detach().dense()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_to_scores_it_hides(dtype: torch.dtype, mask: DocumentMask) -> None:
    scores = torch.randn(1, 2, 8, 8, dtype=dtype, requires_grad=True)
    square = torch.tensor(_square(LENGTHS))
    for total in (scores + mask, mask + scores, scores.clone().add_(mask)):
        assert total.dtype == dtype
        assert torch.equal(total.softmax(-1), scores.masked_fill(~square, -torch.inf).softmax(-1))
    (grad,) = torch.autograd.grad((scores + mask).sum(), scores)
    assert torch.equal(grad, torch.ones_like(scores))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_torch_attention_sees_the_mask(needs_grad: bool, mask: DocumentMask) -> None:
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=needs_grad) for _ in range(3))
    ours, theirs = (F.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (mask, mask.dense()))
    assert torch.equal(ours, theirs)
    if needs_grad:
        grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_model_of_transformers_keeps_documents_apart(name: str, implementation: str, mask: DocumentMask) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation=implementation, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    ids = torch.randint(1, 50, (1, 8))
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, position_ids=_positions(LENGTHS), use_cache=False)[0]
        alone = torch.cat([model(part, use_cache=False)[0] for part in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)


# Positions ----------------------------------------------------------------------------------------------------------


def test_positions_are_looked_at_once() -> None:
    positions = _positions(LENGTHS)
    found = documents_of(positions)
    assert found.lengths == LENGTHS
    assert documents_of(positions) is found
    assert documents_of(positions.clone()) is not found
    positions[0, 5] = 0
    assert documents_of(positions).lengths == (3, 1, 1, 1, 2)


def test_positions_that_begin_anywhere() -> None:
    assert documents_of(torch.tensor([[5, 6, 0, 7, 8]])).lengths == (2, 1, 2)
    assert documents_of(torch.tensor([[4, 4]], dtype=torch.int32)).lengths == (1, 1)


def test_what_is_remembered_is_not_looked_at() -> None:
    """Positions on the meta device cannot be looked at."""
    positions = torch.empty(1, 8, dtype=torch.long, device="meta")
    told = remember(positions, LENGTHS)
    assert documents_of(positions) is told
    assert told.device == positions.device
    gone = weakref.ref(told)
    del told, positions
    gc.collect()
    assert gone() is None


def test_positions_of_inference_mode() -> None:
    with torch.inference_mode():
        positions = _positions(LENGTHS)
    assert documents_of(positions) is documents_of(positions)


def test_positions_that_do_not_fit() -> None:
    for shape in ((2, 4), (8,), (1, 0)):
        with pytest.raises(ValueError, match=r"expected \(1, T\)"):
            documents_of(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="lengths of 7 tokens in all"):
        remember(_positions(LENGTHS), (3, 4))


def test_nothing_is_known_of_positions_that_are_gone() -> None:
    before = len(module._KNOWN)
    positions = _positions(LENGTHS)
    documents_of(positions)
    assert len(module._KNOWN) == before + 1
    del positions
    gc.collect()
    assert len(module._KNOWN) == before
