"""LoRA linears without autograd: dropout that is drawn again, weights that train, outputs in a given buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from integration_tests.peft_layers import linears_of, siblings
from sloth_kernels import launch, lora_passes
from sloth_kernels.adapters import Adapter, LoraLinear, autocast_dtype, needs_of, operands_of, plan_of
from sloth_kernels.dropout import drop, generator_of, replaying
from sloth_kernels.frozen_weight import DenseWeight
from sloth_kernels.ops import lora

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Gradients = list[torch.Tensor | None]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * std).to(dtype)


def _linears(n_in: int, outputs: Sequence[int], dropout: float = 0.0, trained: bool = False) -> list[LoraLinear]:
    """One adapter of rank 4 each."""
    linears = []
    for i, n_out in enumerate(outputs):
        A_RK, B_NR = _randn(4, n_in, seed=3 * i).requires_grad_(), _randn(n_out, 4, seed=3 * i + 1).requires_grad_()
        weight = DenseWeight(_randn(n_out, n_in, seed=3 * i + 2).requires_grad_(trained))
        linears.append(LoraLinear(weight, None, [Adapter(A_RK, B_NR, 0.5, dropout)]))
    return linears


def _state() -> torch.Tensor:
    return generator_of(DEVICE).get_state()


def _functional(
    x: torch.Tensor, linears: list[LoraLinear], dys: Sequence[torch.Tensor]
) -> tuple[lora_passes.Computed, torch.Tensor | None, Gradients]:
    """Forward and backward as a caller with a backward of its own makes them."""
    with torch.no_grad():
        plan = plan_of(linears, x.shape, x.dtype, autocast_dtype(x))
        operands = operands_of(linears)
        needs = needs_of(operands)
        computed = lora_passes.forward(x, plan, operands)
        kept = computed.banks_t if any(needs.Bs) else ()
        saved = lora_passes.Saved(plan, operands, x if lora_passes.saves_x(needs) else None, kept, computed.draws)
        dx, grads = lora_passes.backward(dys, saved, needs, x.dtype)
    return computed, dx, [*grads.weights, *grads.biases, *grads.As, *grads.Bs]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_autograd(trained: bool, dropout: float) -> None:
    linears, x = _linears(16, [8, 12], dropout, trained), _randn(2, 5, 16).requires_grad_()
    dys = [_randn(2, 5, n, seed=9) for n in (8, 12)]
    leaves = [t for t in lora.flattened(operands_of(linears)) if t is not None]
    torch.manual_seed(0)
    ys = lora.lora_linears(x, linears)
    dx, *expected = torch.autograd.grad(ys, [x, *leaves], dys)
    torch.manual_seed(0)
    computed, own_dx, grads = _functional(x.detach(), linears, dys)
    assert all(map(torch.equal, computed.ys, ys))
    assert own_dx is not None
    assert torch.equal(own_dx.view_as(dx), dx)
    assert all(map(torch.equal, [g for g in grads if g is not None], expected))


# Dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (1, 1)])
def test_draws_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same masks, and the same random numbers afterwards."""
    x = _randn(*shape).abs().add(1).to(dtype)
    for p in (0.1, 0.5, 1.0):
        torch.manual_seed(7)
        stock, after = torch.nn.functional.dropout(x, p), _state()
        torch.manual_seed(7)
        dropped, keep = drop(x, p)
        assert torch.equal(keep.bool(), stock != 0)
        torch.testing.assert_close(dropped, stock)
        assert torch.equal(_state(), after)


def test_masks_do_not_depend_on_where_x_lies() -> None:
    buffer = _randn(9, 65)
    views = [buffer[1:, 1:], buffer[1:, 1:].t().contiguous().t(), buffer.flatten()[1 : 8 * 64 + 1].view(8, 64)]
    masks = []
    for x in views:
        torch.manual_seed(7)
        masks.append(drop(x, 0.5)[1])
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def _peft_masks(fn: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor) -> list[torch.Tensor]:
    """Which entries of x reach each y, and which entries of its gradient come back, of linears that are x̃ itself."""
    torch.manual_seed(11)
    ys = fn(x)
    backs = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in ys]
    return [t != 0 for t in (*ys, *backs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [[32], [32, 32]], ids=str)
def test_masks_are_pefts(ranks: list[int], dtype: torch.dtype) -> None:
    """Each adapter's own, in the order in which PEFT's modules draw: siblings, and the adapters of each."""
    model = siblings(32, [32, 32], dtype, device=DEVICE, ranks=ranks, dropout=0.5)
    for name, parameter in model.named_parameters():
        adapter = 3.0 if "adapter_1" in name else 1.0
        parameter.data.copy_(torch.eye(32) * (0 if "base_layer" in name else adapter))
    x = (_randn(2, 6, 32).abs() + 0.5).to(dtype).requires_grad_()
    stock, after = _peft_masks(model, x), _state()
    ours = _peft_masks(lambda x: lora.lora_linears(x, linears_of(model)), x)
    assert all(map(torch.equal, ours, stock))
    assert not torch.equal(ours[0], ours[1])
    assert not stock[0].all()
    assert torch.equal(_state(), after)


def test_one_mask_at_a_time_and_none_kept() -> None:
    linears, x = _linears(16, [8, 8], dropout=0.5), _randn(2, 5, 16).requires_grad_()
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ys = lora.lora_linears(x, linears)
    assert sorted(shapes) == sorted([(2, 5, 16), *[(10, 4), (4, 16), (8, 4)] * 2])
    node: Any = ys[0].grad_fn
    assert all(state.numel() * state.element_size() < 10_000 for state in node.draws)


def test_forward_computes_the_same_again_and_leaves_the_stream() -> None:
    linears, x = _linears(16, [8, 12], dropout=0.5), _randn(5, 16)
    plan, operands = plan_of(linears, x.shape, x.dtype, None), operands_of(linears)
    with torch.no_grad():
        first = lora_passes.forward(x, plan, operands)
        before = _state()
        again = lora_passes.forward(x, plan, operands, first.draws)
        assert torch.equal(_state(), before)
        other = lora_passes.forward(x, plan, operands)
    assert all(map(torch.equal, first.ys, again.ys))
    assert all(map(torch.equal, first.banks_t, again.banks_t))
    assert not torch.equal(first.ys[0], other.ys[0])


def test_backward_leaves_the_stream() -> None:
    linears, x = _linears(16, [8], dropout=0.5), _randn(5, 16).requires_grad_()
    (y,) = lora.lora_linears(x, linears)
    torch.manual_seed(99)
    before = _state()
    y.sum().backward()
    assert torch.equal(_state(), before)
    with replaying(DEVICE) as generator:
        generator.manual_seed(1)
    assert torch.equal(_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_checkpointing(reentrant: bool) -> None:
    linears, x = _linears(16, [8, 8], dropout=0.5), _randn(5, 16).requires_grad_()
    inputs = [x, *linears[1].adapters[0][:2]]
    results = []
    for fn in (lambda x: checkpoint(lora.lora_linears, x, linears, use_reentrant=reentrant), None):
        torch.manual_seed(5)
        ys: Any = fn(x) if fn else lora.lora_linears(x, linears)
        torch.rand(3, device=DEVICE)
        for t in inputs:
            t.grad = None
        (ys[0] + ys[1]).sum().backward()
        results.append([t.grad for t in inputs])
    assert all(map(torch.equal, *results))


def test_dropout_of_everything_and_of_frozen_adapters() -> None:
    (linear,), x = _linears(16, [8], dropout=1.0), _randn(5, 16).requires_grad_()
    (y,) = lora.lora_linears(x, [linear])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, linear.weight.dense(torch.float32)))
    assert not torch.autograd.grad(y.sum(), linear.adapters[0].A_RK)[0].any()
    adapter = linear.adapters[0]._replace(dropout=0.5)
    frozen = linear._replace(adapters=[adapter._replace(A_RK=adapter.A_RK.detach(), B_NR=adapter.B_NR.detach())])
    gradients = []
    for fn in (lora.lora_linears, lora.reference):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(fn(x, [frozen])[0].sum(), x)[0])
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        lora.lora_linears(x, [linear._replace(adapters=[adapter._replace(dropout=1.5)])])


# Weights that train ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_trained_weights_under_autocast(dtype: torch.dtype) -> None:
    """float32 weights and bfloat16 products: gradients in the weights' dtype."""
    linear = torch.nn.Linear(24, 16, device=DEVICE)
    x = _randn(7, 24, dtype=dtype).requires_grad_()
    inputs = [x, linear.weight, linear.bias]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (ours,) = lora.lora_linears(x, [LoraLinear(DenseWeight(linear.weight), linear.bias)])
        stock = linear(x)
    assert torch.equal(ours, stock)
    truth = torch.autograd.grad(
        torch.nn.functional.linear(*(t.double() for t in inputs)), inputs, _randn(7, 16, seed=4).double()
    )
    for y in (ours, stock):
        gradients = torch.autograd.grad(y, inputs, _randn(7, 16, seed=4).bfloat16())
        assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
        torch.testing.assert_close(gradients, truth, rtol=0.02, atol=0.05, check_dtype=False)


def test_a_changed_weight_is_noticed() -> None:
    linears, x = _linears(16, [8], trained=True), _randn(5, 16).requires_grad_()
    (y,) = lora.lora_linears(x, linears)
    with torch.no_grad():
        linears[0].weight.dense(torch.float32).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_trained_weights_cost_a_gradient() -> None:
    frozen, trained = _linears(16, [8]), _linears(16, [8], trained=True)
    linears, x = [frozen[0]._replace(adapters=()), trained[0]._replace(adapters=())], _randn(5, 16)
    dys = [_randn(5, 8), _randn(5, 8)]
    _, _, grads = _functional(x, linears, dys)
    assert grads[0] is None
    torch.testing.assert_close(grads[1], dys[1].t() @ x)


# Buffers and plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_as_columns_of_one_buffer(dtype: torch.dtype) -> None:
    """bfloat16 x and float32 adapters: y is summed elsewhere and rounded into the buffer."""
    linears, x = _linears(16, [8, 12]), _randn(2, 5, 16, dtype=dtype)
    linears = [linear._replace(weight=DenseWeight(linear.weight.dense(dtype))) for linear in linears]
    plan, operands = plan_of(linears, x.shape, x.dtype, None), operands_of(linears)
    buffer = torch.full((10, 22), 7.0, dtype=dtype, device=DEVICE)
    outs = [buffer[:, :8], buffer[:, 8:20]]
    with torch.no_grad():
        ys = lora_passes.forward(x, plan, operands, outs=outs).ys
        plain = lora_passes.forward(x, plan, operands).ys
    for y, out, other in zip(ys, outs, plain, strict=True):
        assert y.data_ptr() == out.data_ptr()
        assert torch.equal(y, other.view_as(y))
    assert (buffer[:, 20:] == 7).all()
    columns = _functional(x, linears, outs)
    apart = _functional(x, linears, [out.clone() for out in outs])
    torch.testing.assert_close(columns[1:], apart[1:])


def test_plans_are_kept_and_hold_no_tensor() -> None:
    linears, x = _linears(16, [8, 12]), _randn(5, 16)
    plan = plan_of(linears, x.shape, x.dtype, None)
    assert plan_of(_linears(16, [8, 12]), (3, 16), x.dtype, None) is plan
    other_scale = [linear._replace(adapters=[linear.adapters[0]._replace(scale=2.0)]) for linear in linears]
    assert plan_of(other_scale, x.shape, x.dtype, None).scales == (2.0, 2.0)
    assert not [value for value in tree_leaves(plan) if isinstance(value, torch.Tensor)]
