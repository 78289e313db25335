"""Attention on a CPU: every case by every backend that runs here, layouts, masks, dropout.

The kernels for CUDA run on meta tensors, which shows their arguments, shapes and layouts; their numbers are in
``gpu/test_attention.py``.
"""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from integration_tests import numbers
from sloth_kernels import attention_backends as kernels
from sloth_kernels.cases.attention import make_call, make_mask
from sloth_kernels.op import Case
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, OP, AttentionSpec, attention

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [pytest.param(case, id=case.name) for case in OP.cases()]
CUDA_KERNELS = ("cudnn", "flash", "efficient")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    op._CHOSEN.clear()
    yield
    op._CHOSEN.clear()


def _by(backend: op.Backend) -> Callable[..., torch.Tensor]:
    """Attention by one backend, through run and run_backward."""

    class Forced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, sinks: Any, spec: AttentionSpec) -> torch.Tensor:
            ctx.inputs = op.inputs_of(q, k, v, mask, sinks, spec)
            out, ctx.extras = op.run(backend, ctx.inputs)
            ctx.out = out.detach()
            return out

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            dq, dk, dv, dsinks = op.run_backward(backend, dout, ctx.inputs, ctx.out, ctx.extras)
            return dq, dk, dv, None, dsinks, None

    return lambda q, k, v, mask, sinks, *, spec: Forced.apply(q, k, v, mask, sinks, spec)


def _call(seq: int = 13, mask: str = "none", sinks: bool = False, **spec: Any) -> numbers.Call:
    return make_call(torch.float32, CPU, AttentionSpec(0.3, **spec), 2, seq, (4, 2), (16, 16), mask, sinks)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=_dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    numbers.check(OP.fn, OP.reference, lambda: case.make(dtype, CPU), OP.tolerance[dtype])


def _flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool, window_size: Any) -> Any:
    """What ``flash_attn.cute.flash_attn_func`` promises, (B, S, H, D) in and out, the log-sum-exp beside it."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    left, right = window_size
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen & (distance >= 0) if causal or right == 0 else seen
    seen = seen if left is None else seen & (distance <= left)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, seen, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2), None


def _form(x: op.Inputs) -> Any:
    """What FlexAttention's backend decides by: each call that it sees anew is traced, which takes a second."""
    mask = None if x.mask is None else (x.mask.dtype, *(size > 1 for size in x.mask.shape))
    group = x.q.shape[1] // x.k.shape[1]
    return x.form, x.spec.softcap is None, x.spec.window is None, mask, group, x.q.is_contiguous(), x.q.stride(-1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("cpu", "sdpa", "eager", "flash4") for dtype in (torch.float32, torch.bfloat16)),
        ("flex", torch.float32),
    ],
)
def test_each_backend(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash4_function", lambda: _flash_attn_func)
    # FlexAttention refuses gradients on a CPU, where the uncompiled one computes them well.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    backend = dataclasses.replace(BACKENDS[name], devices=("cpu",), allows=lambda x: True, dtypes=(dtype,))
    taken, forms = 0, set()
    for case in OP.cases():
        args, kwargs = case.make(dtype, CPU)
        x = op.inputs_of(*args, **kwargs)
        if op.refusal(backend, x) is None and not (name == "flex" and _form(x) in forms):
            taken += 1
            forms.add(_form(x))
            numbers.check(_by(backend), OP.reference, lambda case=case: case.make(dtype, CPU), OP.tolerance[dtype])
    assert taken >= 14


@pytest.mark.parametrize("case", CASES)
def test_reference_gradients(case: Case) -> None:
    args, kwargs = numbers.in_float64(case.make(torch.float64, CPU))
    leaves = [arg for arg in args if arg is not None and arg.requires_grad]

    def differentiable(q: Any, k: Any, v: Any, *sinks: Any) -> torch.Tensor:
        return OP.reference(q, k, v, args[3], *sinks, **kwargs)

    assert torch.autograd.gradcheck(differentiable, leaves, fast_mode=True)


def _module(**attributes: Any) -> Any:
    return types.SimpleNamespace(num_key_value_groups=2, training=False, **attributes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_dtype_name)
@pytest.mark.parametrize(("model", "options"), [("llama", {}), ("gemma2", {"softcap": 3.0}), ("gpt_oss", {})])
def test_reference_is_the_models_own(model: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Equal to the bit; but for gpt-oss, which takes its softmax in the model's dtype."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    (q, k, v, mask, sinks), _ = make_call(
        dtype, CPU, AttentionSpec(1.0), 2, 13, (4, 2), (16, 16), "float-left-window5", model == "gpt_oss"
    )
    theirs, _ = modeling.eager_attention_forward(_module(sinks=sinks), q, k, v, mask, scaling=0.3, **options)
    ours = OP.reference(q, k, v, mask, sinks, spec=AttentionSpec(0.3, **options)).transpose(1, 2)
    if model == "gpt_oss":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    else:
        assert torch.equal(ours, theirs)


def test_window_is_that_of_transformers() -> None:
    overlay = pytest.importorskip("transformers.masking_utils").sliding_window_overlay(5)
    (q, k, *_), _ = _call()
    theirs = [[j <= i and overlay(0, 0, i, j) for j in range(13)] for i in range(13)]
    assert op.band(q, k, AttentionSpec(1.0, window=5)).tolist() == theirs


# Rows without keys, gradients of masks, dropout ---------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["cpu", "sdpa", "eager"])
def test_rows_without_keys(name: str, sinks: bool) -> None:
    if sinks and not BACKENDS[name].sinks:
        pytest.skip(f"{name} takes no sinks")
    (q, k, v, mask, sink), kwargs = _call(mask="bool-left", sinks=sinks)
    assert mask is not None
    hidden = ~mask.any(-1).expand(2, 4, 13)
    assert hidden.any()
    out = _by(BACKENDS[name])(q, k, v, mask, sink, **kwargs)
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert (out[hidden] == 0).all()
    assert (grads[0][hidden] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_mask_with_a_gradient_gets_it() -> None:
    (q, k, v, mask, _), kwargs = _call(mask="bias")
    assert mask is not None
    mask.requires_grad_()
    ours, theirs = (torch.autograd.grad(fn(q, k, v, mask, **kwargs).sum(), mask)[0] for fn in (OP.fn, OP.reference))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_drops_the_same_in_both_directions(softcap: float | None) -> None:
    args, kwargs = numbers.in_float64(_call(seq=5, softcap=softcap, dropout=0.5))

    def seeded(*leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attention(*leaves, **kwargs)

    kept = attention(*args, spec=dataclasses.replace(kwargs["spec"], dropout=0.0))
    assert not torch.equal(seeded(*args[:3]), kept)
    assert torch.autograd.gradcheck(seeded, args[:3], fast_mode=True)
    mean = torch.stack([attention(*args, **kwargs).detach() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, kept, rtol=0, atol=0.15)


# Functional use, layouts, masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_forward_and_backward_are_what_autograd_runs(softcap: float | None, sinks: bool) -> None:
    (q, k, v, mask, sink), kwargs = _call(mask="bool-right", sinks=sinks, softcap=softcap)
    inputs = [t for t in (q, k, v, sink) if t is not None]
    out = attention(q, k, v, mask, sink, **kwargs)
    dout = torch.randn_like(out)
    theirs = torch.autograd.grad(out, inputs, dout)
    with torch.no_grad():
        plain, extras = op.forward(q, k, v, mask, sink, kwargs["spec"])
        ours = op.backward(dout, q, k, v, plain, extras, mask, sink, kwargs["spec"])
    assert not plain.requires_grad
    assert torch.equal(plain, out)
    assert len(ours) == 4
    assert (ours[3] is None) == (sink is None)
    assert all(torch.equal(a, b) for a, b in zip([t for t in ours if t is not None], theirs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_token_major(case: Case) -> None:
    args, kwargs = case.make(torch.float32, CPU)
    assert attention(*args, **kwargs).transpose(1, 2).is_contiguous()


def test_projections_are_not_copied() -> None:
    (q, k, v, *_), _ = _call()
    assert all(kernels.walkable(t) is t for t in (q, k, v))
    out, _ = op.forward(q, k, v, None, None, AttentionSpec(0.3))
    assert kernels.token_major(out) is not None
    assert kernels.token_major(out).data_ptr() == out.data_ptr()
    grads = op.backward(torch.ones_like(out), q, k, v, out, _, None, None, AttentionSpec(0.3))[:3]
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_cuda_kernels_on_meta_tensors(name: str, case: Case) -> None:
    """Arguments fit the operators' schemas; shapes, layouts and dtypes are as promised."""
    args, kwargs = case.make(torch.bfloat16, CPU)
    backend = dataclasses.replace(BACKENDS[name], devices=("cpu",), allows=lambda x: True)
    if what := op.refusal(backend, op.inputs_of(*args, **kwargs)):
        pytest.skip(what)
    q, k, v, mask, sinks = (None if arg is None else arg.detach().to("meta") for arg in args)
    x = op.inputs_of(q, k, v, mask, sinks, **kwargs)
    out, extras = op.run(backend, x)
    grads = op.run_backward(backend, torch.empty_like(out), x, out, extras)
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.transpose(1, 2).is_contiguous()
    assert extras[0].dtype == torch.float32
    for grad, given in zip(grads, (q, k, v, sinks), strict=True):
        assert (grad is None) == (given is None)
        assert given is None or (grad.shape, grad.dtype) == (given.shape, given.dtype)
        if "-projection" in case.name and given is not sinks:
            assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["bool-left", "bias"])
def test_a_mask_is_made_additive_once_and_again_when_it_changes(kind: str) -> None:
    (q, k, v, *_), kwargs = _call()
    mask = make_mask(kind, 2, 13, torch.float32, CPU)
    assert mask is not None
    x = op.inputs_of(q, k, v, mask, None, **kwargs)
    first = kernels.additive(x, multiple=16)
    assert first is not None
    assert first.shape == (2, 4, 13, 13)
    assert first.stride(2) == 16
    assert kernels.additive(x, multiple=16).data_ptr() == first.data_ptr()
    mask.zero_()
    again = kernels.additive(x, multiple=16)
    assert torch.equal(again, torch.full_like(again, -torch.inf if mask.dtype == torch.bool else 0.0))
    made = weakref.ref(kernels._BIASES[mask][next(iter(kernels._BIASES[mask]))])
    del x, mask, again, first
    gc.collect()
    assert made() is None


def test_cudnn_is_given_no_infinity() -> None:
    (q, k, v, *_), kwargs = _call()
    for mask in (torch.zeros(13, 13, dtype=torch.bool), torch.full((13, 13), -torch.inf)):
        bias = kernels.additive(op.inputs_of(q, k, v, mask, None, **kwargs), kernels.CUDNN_MASKED)
        assert torch.equal(bias, torch.full((2, 4, 13, 13), -65504.0))
