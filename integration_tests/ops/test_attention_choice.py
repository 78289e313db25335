"""Which backend attention chooses, and what it refuses."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from integration_tests import numbers
from sloth_kernels import attention_backends as kernels
from sloth_kernels.cases.attention import make_call
from sloth_kernels.documents import DocumentMask, Documents
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, AttentionSpec, attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    op._CHOSEN.clear()
    yield
    op._CHOSEN.clear()


def _call(seq: int = 13, mask: str = "none", **spec: Any) -> numbers.Call:
    return make_call(torch.float32, CPU, AttentionSpec(0.3, **spec), 2, seq, (4, 2), (16, 16), mask)


@pytest.fixture
def all_allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say that torch and the device allow every kernel but the named ones."""

    def allow(*without: str) -> None:
        backends = {
            name: dataclasses.replace(backend, allows=lambda x, name=name: name not in without)
            for name, backend in BACKENDS.items()
        }
        monkeypatch.setattr(op, "BACKENDS", backends)

    allow()
    return allow


CHOICES = [
    ("cudnn", {}, {}, ()),
    ("cudnn", {"causal": False}, {}, ()),
    ("flash4", {}, {}, ("cudnn",)),
    ("flash", {}, {}, ("cudnn", "flash4")),
    ("flash4", {}, {"width": 128}, ("cudnn",)),
    ("flash", {}, {"width": 256}, ()),
    ("cudnn", {"dropout": 0.25}, {}, ()),
    ("flash", {"dropout": 0.1}, {}, ("cudnn",)),
    ("cudnn", {}, {"sinks": True}, ()),
    ("flash", {"window": 5}, {"sinks": True}, ()),
    ("flash4", {"window": 5}, {}, ()),
    ("flash", {"window": 5}, {}, ("flash4",)),
    ("cudnn", {"window": 13}, {}, ()),
    ("efficient", {}, {"mask": "bool-left"}, ()),
    ("efficient", {}, {"mask": "bool-left", "sinks": True}, ()),
    ("flex", {"softcap": 50.0}, {}, ()),
    ("flex", {"softcap": 50.0, "window": 5}, {"mask": "bool-left"}, ()),
    ("eager", {"softcap": 50.0}, {"sinks": True}, ()),
    ("sdpa", {}, {"width": 20}, ()),
    ("sdpa", {}, {"width": 20, "mask": "bool-left"}, ()),
    ("flex", {"window": 5}, {"width": 20}, ()),
    ("sdpa", {"dropout": 0.1}, {"width": 20}, ()),
    ("efficient", {}, {"dtype": torch.float32}, ()),
    ("sdpa", {}, {"dtype": torch.float64}, ()),
    ("eager", {}, {"seq": 0}, ()),
]


@pytest.mark.parametrize(("expected", "spec", "sizes", "without"), CHOICES)
def test_choice_on_cuda(
    expected: str,
    spec: dict[str, Any],
    sizes: dict[str, Any],
    without: tuple[str, ...],
    all_allowed: Callable[..., Any],
) -> None:
    all_allowed(*without)
    dtype, seq, width = sizes.get("dtype", torch.bfloat16), sizes.get("seq", 13), sizes.get("width", 64)
    with FakeTensorMode():
        q, k, v = (torch.empty(2, seq, n, width, dtype=dtype, device="cuda").transpose(1, 2) for n in (4, 2, 2))
        mask = torch.empty(2, 1, seq, seq, dtype=torch.bool, device="cuda") if "mask" in sizes else None
        sinks = torch.empty(4, device="cuda") if sizes.get("sinks") else None
        assert op.choose(q, k, v, mask, AttentionSpec(0.1, **spec), sinks).name == expected


DOCUMENTS = [
    ("varlen", (5, 8), {}, (), {}),
    ("varlen", (5, 8), {"window": 3, "dropout": 0.1}, (), {"sinks": True}),
    ("apart", (5, 8), {}, ("varlen",), {}),
    ("flex_documents", (5, 8), {"softcap": 50.0}, (), {}),
    ("apart", (5, 8), {"softcap": 50.0}, (), {"sinks": True}),
    ("apart", (5, 8), {}, (), {"dtype": torch.float32}),
    ("apart", (5, 8), {}, (), {"width": 20}),
    ("apart", (6, 6), {}, (), {}),
    ("apart", (6, 6), {"softcap": 50.0}, (), {}),
    ("apart", (13,), {"window": 3}, (), {"sinks": True}),
]


@pytest.mark.parametrize(("expected", "lengths", "spec", "without", "sizes"), DOCUMENTS)
def test_choice_for_documents_on_cuda(
    expected: str,
    lengths: tuple[int, ...],
    spec: dict[str, Any],
    without: tuple[str, ...],
    sizes: dict[str, Any],
    all_allowed: Callable[..., Any],
) -> None:
    all_allowed(*without, *(() if "softcap" in spec else ("flex_documents",)))
    dtype, seq, width = sizes.get("dtype", torch.bfloat16), sum(lengths), sizes.get("width", 64)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, seq, n, width, dtype=dtype, device="cuda").transpose(1, 2) for n in (4, 2, 2))
        mask = DocumentMask(Documents(lengths, "cuda"))
        sinks = torch.empty(4, device="cuda") if sizes.get("sinks") else None
        assert op.choose(q, k, v, mask, AttentionSpec(0.1, **spec), sinks).name == expected


def test_flex_takes_documents_for_a_softcap_alone() -> None:
    (q, k, v, mask, _), _ = make_call(torch.float32, CPU, AttentionSpec(0.3), 1, 13, (4, 2), (16, 16), "documents-5-8")
    for softcap in (None, 3.0):
        x = op.inputs_of(q, k, v, mask, None, AttentionSpec(0.3, softcap))
        assert BACKENDS["flex_documents"].allows(x) is (softcap is not None)


def test_choice_is_made_once_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    allows = lambda x: asked.append(x) is None
    backends = {**BACKENDS, "cpu": dataclasses.replace(BACKENDS["cpu"], allows=allows)}
    monkeypatch.setattr(op, "BACKENDS", backends)
    for _ in range(3):
        (q, k, v, mask, _), kwargs = _call(mask="bool-left")
        attention(q, k, v, mask, **kwargs).sum().backward()
    assert len(asked) == 1
    (q, k, v, mask, _), kwargs = _call(seq=14, mask="bool-left")
    attention(q, k, v, mask, **kwargs)
    assert len(asked) == 2


def test_strides_do_not_decide() -> None:
    """The choice is kept for all calls of a form, so that the first one's layout must not show."""
    seen = []
    backend = dataclasses.replace(BACKENDS["efficient"], devices=("cpu",), dtypes=(torch.float32,))
    backend = dataclasses.replace(backend, allows=lambda x: seen.append(x) is None)
    for layout in ("projection", "strided"):
        (q, k, v, *_), kwargs = make_call(
            torch.float32, CPU, AttentionSpec(0.3), 2, 13, (4, 2), (16, 24), layout=layout
        )
        assert op.refusal(backend, op.inputs_of(q, k, v, None, None, **kwargs)) is None
    assert [t.stride() for t in seen[0][:3]] == [t.stride() for t in seen[1][:3]]
    assert [t.shape for t in seen[0][:3]] == [(2, 4, 13, 16), (2, 4, 13, 16), (2, 4, 13, 24)]


@pytest.mark.parametrize(("version", "seq", "takes"), [(91500, 13, False), (91500, 128, True), (91501, 13, True)])
def test_old_cudnn_takes_multiples_of_128(version: int, seq: int, takes: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "torch_allows", lambda name: lambda x: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    (q, k, v, *_), kwargs = _call(seq=seq)
    assert kernels.cudnn_allows(op.inputs_of(q, k, v, None, None, **kwargs)) is takes


def test_flash4_is_used_only_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v, *_), kwargs = _call()
    x = op.inputs_of(q, k, v, None, None, **kwargs)
    kernels.flash4_function.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert not kernels.flash4_allows(x)
    kernels.flash4_function.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_func=print))
    for major, takes in ((8, False), (9, True), (10, True), (12, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert kernels.flash4_allows(x) is takes
    kernels.flash4_function.cache_clear()


def test_every_preferred_backend_exists_and_the_last_takes_all() -> None:
    for names in (*op.PREFERENCE.values(), op.ELSEWHERE, op.DOCUMENTS_ELSEWHERE):
        assert set(names) <= set(BACKENDS)
        assert names[-1] == "eager"


# Errors -------------------------------------------------------------------------------------------------------------


WRONG = [
    ({"k": (2, 2, 13, 8), "v": (2, 2, 13, 16)}, "of one D"),
    ({"k": (2, 3, 13, 16), "v": (2, 3, 13, 16)}, "Hq a multiple of Hk"),
    ({"v": (2, 2, 12, 16)}, r"expected q \(B, Hq, S, D\)"),
    ({"k": (1, 2, 13, 16), "v": (1, 2, 13, 16)}, r"expected q \(B, Hq, S, D\)"),
    ({"mask": (13, 12)}, r"broadcastable to \(2, 4, 13, 13\)"),
    ({"mask": (3, 1, 13, 13)}, r"broadcastable to \(2, 4, 13, 13\)"),
    ({"sinks": (2,)}, "one for each of 4 query heads"),
]


@pytest.mark.parametrize(("shapes", "message"), WRONG)
def test_shapes_that_do_not_fit(shapes: dict[str, Any], message: str) -> None:
    sizes = {"q": (2, 4, 13, 16), "k": (2, 2, 13, 16), "v": (2, 2, 13, 16), **shapes}
    with pytest.raises(ValueError, match=message):
        attention(**{name: torch.zeros(size) for name, size in sizes.items()}, spec=AttentionSpec(1.0))


def test_dtypes_and_devices_that_do_not_fit() -> None:
    (q, k, v, *_), kwargs = _call()
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.half(), v, **kwargs)
    with pytest.raises(ValueError, match="one device"):
        attention(q, k, v, torch.ones(13, 13, dtype=torch.bool, device="meta"), **kwargs)
    with pytest.raises(ValueError, match="expected bool or floating"):
        attention(q, k, v, torch.ones(13, 13, dtype=torch.int64), **kwargs)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 5, "causal": False}, {"dropout": 1.0}])
def test_specs_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AttentionSpec(1.0, **options)
