"""Whatever the plan keeps: stock's losses and gradients, stock's masks."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from integration_tests.plugins.layer_programs.common import (
    MODES,
    WHOLE_BLOCKS,
    adapted,
    assert_same,
    gradients,
    llama,
    plans_of,
    quantised,
    train,
    twins,
)
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches, make_model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_every_mode_is_stock(name: str, mode: str) -> None:
    mine, stock = twins(adapted(make_model(name)), memory=mode)
    assert_same(train(mine), train(stock))


@pytest.mark.parametrize("mode", MODES)
def test_full_training(mode: str) -> None:
    mine, stock = twins(make_model("llama"), memory=mode)
    assert_same(train(mine), train(stock))


@pytest.mark.parametrize("mode", MODES)
def test_4bit(mode: str) -> None:
    mine, stock = twins(adapted(quantised(make_model("llama", **WHOLE_BLOCKS))), memory=mode)
    assert_same(train(mine), train(stock))


def test_the_modes_differ(runs: list[Call]) -> None:
    """What is compared above is not the same plan three times."""
    kept = {}
    for mode in ("least", "fastest"):
        mine, _ = twins(llama(), memory=mode)
        del runs[:]
        train(mine, make_batches(1))
        kept[mode] = [call.kept for call in runs]
    assert "gate" not in kept["least"][0]
    assert all(least <= most for least, most in zip(kept["least"], kept["fastest"], strict=True))
    assert {*kept["fastest"]} == {runs[0].program.savable}


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_stocks_masks_and_draws_them_again(mode: str) -> None:
    mine, stock = twins(llama(lora_dropout=0.1), memory=mode)
    expected = train(stock)
    assert_same(train(mine), expected)
    other_masks = train(stock, seed=4)
    with pytest.raises(AssertionError):
        assert_same(other_masks, expected)


def test_dropout_leaves_the_generator_where_stock_does() -> None:
    states = []
    for model in twins(llama(lora_dropout=0.1), memory="least"):
        train(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_micro_batches_of_other_lengths(mode: str) -> None:
    """Each length has a plan of its own; forwards may come in any order."""
    batches = [batch for length in (17, 9, 23, 17) for batch in make_batches(1, length=length, seed=length)]
    mine, stock = twins(llama(lora_dropout=0.1), memory=mode)
    assert_same(train(mine, batches), train(stock, batches))
    assert len(plans_of(mine)) == 1


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_two_forwards_before_their_backwards(mode: str) -> None:
    """As in preference training: the second forward is of another length."""
    mine, stock = twins(llama(), memory=mode)
    first, second = make_batches(1)[0], make_batches(1, length=11)[0]
    results = []
    for model in (mine, stock):
        (model(**first).loss - 0.5 * model(**second).loss).backward()
        results.append(gradients(model))
    assert_same(*results)


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_backward_again(mode: str) -> None:
    mine, stock = twins(llama(lora_dropout=0.1), memory=mode)
    results = []
    for model in (mine, stock):
        torch.manual_seed(3)
        loss = model(**make_batches(1)[0]).loss
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(model))
    assert_same(*results)


def test_a_second_derivative_is_refused() -> None:
    mine, _ = twins(llama())
    loss = mine(**make_batches(1)[0]).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_under_autocast(mode: str) -> None:
    """bfloat16 products over float32 weights: no further from float64 than stock is."""
    mine, stock = twins(llama(), memory=mode)
    truth = train(copy.deepcopy(stock).double(), make_batches(1))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (train(model, make_batches(1)) for model in (mine, stock))
    for name, true in truth.items():
        off = [((found[name] - true).norm() / true.norm()).item() for found in (ours, theirs)]
        assert off[0] <= off[1] + 5e-3, (name, off)


def in_float64(model: Any) -> Any:
    """A copy with its 4-bit weights as they are read, dense."""
    found = copy.deepcopy(model)
    for name, packed in [*found.named_modules()]:
        if isinstance(packed, bnb.nn.Linear4bit):
            weight: Any = packed.weight
            linear = torch.nn.Linear(packed.in_features, packed.out_features, bias=False)
            linear.weight = torch.nn.Parameter(dequantize_4bit(weight.data, weight.quant_state), False)
            parent, _, child = name.rpartition(".")
            setattr(found.get_submodule(parent), child, linear)
    return found.double()


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=["adapters32", "adapters16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_4bit_products_in_bfloat16_between_float32_states(mode: str, autocast: bool, adapters: torch.dtype) -> None:
    """As TRL loads a model by name: float32, with bnb_4bit_compute_dtype=bfloat16."""
    model = adapted(quantised(make_model("llama", **WHOLE_BLOCKS), compute_dtype=torch.bfloat16))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(adapters)
    mine, stock = twins(model, memory=mode)
    truth = train(in_float64(stock), make_batches(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (train(model, make_batches(1)) for model in (mine, stock))
    assert {name: grad.dtype for name, grad in ours.items()} == {name: grad.dtype for name, grad in theirs.items()}
    off = {
        n: [((found[n] - true).norm() / true.norm()).item() for found in (ours, theirs)] for n, true in truth.items()
    }
    assert not {name: pair for name, pair in off.items() if not pair[0] <= pair[1] + 2**-7}
    mean = [sum(pair[i] for pair in off.values()) for i in range(2)]
    assert mean[0] <= mean[1], mean


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_an_input_that_wants_a_gradient(mode: str) -> None:
    mine, stock = twins(llama(), memory=mode)
    results: list[Any] = []
    for model in (mine, stock):
        embeddings = model.get_input_embeddings()(make_batches(1)[0]["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        results.append({"embeddings": embeddings.grad, **gradients(model)})
    assert_same(*results)
