"""Attention's CUDA kernels, each forced in turn: numbers, layouts, hidden rows, dropout, no wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from integration_tests import numbers
from sloth_kernels.attention_backends import flash4_function
from sloth_kernels.cases.attention import case, make_call
from sloth_kernels.op import Case
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, OP, AttentionSpec, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CUDA = torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
FAST = ("cudnn", "flash", "efficient", *(["flash4"] if flash4_function() else []))
"""What is chosen where it can be."""
GENERAL = ("sdpa", "eager")
"""What takes the shapes and masks that those do not."""
LARGE = [
    case(batch=3, seq=257, heads=(8, 2), width=128),
    case("bool-left", batch=3, seq=257, heads=(8, 2), width=128),
    case("float-right", batch=3, seq=250, heads=(8, 2), width=64),
    case(batch=1, seq=1000, heads=(8, 1), width=128, window=200),
    case("bool-right-window100", batch=2, seq=512, heads=(4, 4), width=64),
    case(batch=2, seq=600, heads=(8, 2), width=64, window=128, sinks=True),
    case(batch=1, seq=384, heads=(4, 2), width=256),
]
ODD = [
    case("float-right-window4"),
    case("bias"),
    case(layout="strided"),
    case(width=20, heads=(3, 1)),
    case(width=(24, 16)),
    case(keys=17),
]
SOFTCAP = [case(window=5, softcap=3.0), case(softcap=3.0, sinks=True)]
FLEX = [
    case(batch=2, seq=300, heads=(4, 2), width=256, softcap=3.0),
    case(batch=2, seq=300, heads=(4, 2), width=128, softcap=3.0, window=100),
    case("bool-left", batch=2, seq=300, heads=(6, 2), width=64, softcap=3.0),
    case("float-right", batch=2, seq=300, heads=(4, 2), width=64, softcap=3.0),
]


def _named(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


class _Forced(torch.autograd.Function):
    """Attention by a named backend, through run and run_backward."""

    @staticmethod
    def forward(
        ctx: Any, name: str, q: Any, k: Any, v: Any, mask: Any, sinks: Any, spec: AttentionSpec
    ) -> torch.Tensor:
        ctx.backend, ctx.inputs = BACKENDS[name], op.inputs_of(q, k, v, mask, sinks, spec)
        out, ctx.extras = op.run(ctx.backend, ctx.inputs)
        ctx.out = out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv, dsinks = op.run_backward(ctx.backend, dout, ctx.inputs, ctx.out, ctx.extras)
        return None, dq, dk, dv, None, dsinks, None


def _rows_with_keys(args: tuple[Any, ...]) -> Any:
    """1 for the rows of out that see a key, else 0: what a row without keys reads is the kernels' own affair."""
    mask = args[3]
    if mask is None or mask.dtype != torch.bool:
        return 1
    return mask.any(-1, keepdim=True).expand(args[0].shape[0], args[0].shape[1], args[0].shape[2], 1)


def _check(name: str, case: Case, dtype: torch.dtype) -> None:
    args, kwargs = case.make(dtype, CUDA)
    if what := op.refusal(BACKENDS[name], op.inputs_of(*args, **kwargs)):
        pytest.skip(what)

    def ours(*args: Any, spec: AttentionSpec) -> torch.Tensor:
        return _Forced.apply(name, *args, spec) * _rows_with_keys(args)

    def stock(*args: Any, spec: AttentionSpec) -> torch.Tensor:
        return OP.reference(*args, spec=spec) * _rows_with_keys(args)

    numbers.check(ours, stock, lambda: case.make(dtype, CUDA), OP.tolerance[dtype])


@pytest.mark.parametrize("name", FAST)
@_named([*OP.cases(), *LARGE])
def test_each_backend(name: str, case: Case) -> None:
    _check(name, case, torch.bfloat16)


@pytest.mark.parametrize("name", FAST)
@_named(LARGE)
def test_each_backend_in_float16(name: str, case: Case) -> None:
    _check(name, case, torch.float16)


@pytest.mark.parametrize("name", GENERAL)
@_named([*ODD, *SOFTCAP])
def test_what_takes_the_rest(name: str, case: Case) -> None:
    _check(name, case, torch.bfloat16)


@_named(FLEX)
def test_flex(case: Case) -> None:
    """Few cases: each form compiles."""
    _check("flex", case, torch.bfloat16)


@_named([*LARGE, *ODD])
def test_the_choice(case: Case) -> None:
    """Whatever is chosen obeys the numbers rule, and lays out its output token by token."""
    (q, k, v, mask, sinks), kwargs = case.make(torch.bfloat16, CUDA)
    assert attention(q, k, v, mask, sinks, **kwargs).transpose(1, 2).is_contiguous()
    _check(op.choose(q, k, v, mask, kwargs["spec"], sinks).name, case, torch.bfloat16)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "efficient", "sdpa", "eager"])
def test_rows_without_keys_give_no_nan(name: str, sinks: bool) -> None:
    spec = AttentionSpec(0.1)
    (q, k, v, mask, sink), _ = make_call(torch.bfloat16, CUDA, spec, 2, 40, (4, 2), (64, 64), "bool-left", sinks)
    if what := op.refusal(BACKENDS[name], op.inputs_of(q, k, v, mask, sink, spec)):
        pytest.skip(what)
    out = _Forced.apply(name, q, k, v, mask, sink, spec)
    inputs = [t for t in (q, k, v, sink) if t is not None]
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), inputs)))


@pytest.mark.parametrize("mask", ["none", "bool-right"])
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "sdpa"])
def test_dropout_drops_the_same_in_both_directions(name: str, mask: str) -> None:
    """out is linear in v under the probabilities that were kept: <dout, out> = <dv, v>."""
    spec = AttentionSpec(0.125, dropout=0.25)
    (q, k, v, mask_, _), _ = make_call(torch.bfloat16, CUDA, spec, 2, 256, (4, 2), (64, 64), mask)
    if what := op.refusal(BACKENDS[name], op.inputs_of(q, k, v, mask_, None, spec)):
        pytest.skip(what)
    out = _Forced.apply(name, q, k, v, mask_, None, spec)
    dout = out.detach().clone()
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(
        (dv.double() * v.double()).sum(), (dout.double() * out.double()).sum(), rtol=5e-3, atol=0
    )
    kept = _Forced.apply(name, q, k, v, mask_, None, AttentionSpec(0.125))
    assert not torch.equal(out, kept)


@pytest.mark.parametrize("mask", ["none", "bool-right"])
@pytest.mark.parametrize("sinks", [False, True])
def test_no_wait_for_the_device(mask: str, sinks: bool) -> None:
    spec = AttentionSpec(0.1)
    (q, k, v, mask_, sink), _ = make_call(torch.bfloat16, CUDA, spec, 2, 256, (4, 2), (64, 64), mask, sinks)
    attention(q, k, v, mask_, sink, spec=spec).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, mask_, sink, spec=spec).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_gradients_do_not_depend_on_the_layout_of_an_earlier_call(name: str) -> None:
    """torch keeps cuDNN's plans by the layouts of q, k and v alone."""
    spec = AttentionSpec(128**-0.5)
    (q, k, v, *_), _ = make_call(torch.bfloat16, CUDA, spec, 1, 512, (4, 2), (128, 128))
    dense = torch.randn(1, 512, 4, 128, device=CUDA, dtype=torch.bfloat16)
    apart = dense.new_zeros(1, 512, 4 * 128 + 32)[..., : 4 * 128].copy_(dense.flatten(2)).unflatten(2, (4, 128))
    found = [
        torch.autograd.grad(_Forced.apply(name, q, k, v, None, None, spec), (q, k, v), dout.transpose(1, 2))
        for dout in (dense, apart, dense)
    ]
    for first, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-2, atol=1e-3)


def test_memory_is_that_of_the_output() -> None:
    """Projections are not copied: a forward takes out and the log-sum-exp, and no copy of q, k or v to get there."""
    spec = AttentionSpec(128**-0.5)
    (q, k, v, *_), _ = make_call(torch.bfloat16, CUDA, spec, 2, 2048, (32, 8), (128, 128))
    with torch.no_grad():
        op.forward(q, k, v, None, None, spec)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = op.forward(q, k, v, None, None, spec)
        taken = torch.cuda.max_memory_allocated() - before
    assert kept[0].shape == q.shape
    assert taken < 1.25 * q.numel() * q.element_size()


def test_hopper_takes_cudnn_for_causal_heads_of_128() -> None:
    if torch.cuda.get_device_capability()[0] != 9 or (torch.backends.cudnn.version() or 0) < 91501:
        pytest.skip("needs a Hopper GPU and cuDNN 9.15.1")
    spec = AttentionSpec(128**-0.5)
    (q, k, v, *_), _ = make_call(torch.bfloat16, CUDA, spec, 1, 300, (32, 8), (128, 128))
    assert op.choose(q, k, v, None, spec).name == "cudnn"
