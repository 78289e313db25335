"""Whatever the plan keeps: stock's losses and gradients, stock's masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_an_input_that_wants_a_gradient(mode: str) -> None:
    mine, stock = twins(llama(), memory=mode)
    results: list[Any] = []
    for model in (mine, stock):
        embeddings = model.get_input_embeddings()(make_batches(1)[0]["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        results.append({"embeddings": embeddings.grad, **gradients(model)})
    assert_same(*results)
