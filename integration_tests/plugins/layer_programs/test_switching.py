"""On and off again, copies, checkpointing by the host, evaluation, several models at once."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.layer_programs.common import (
    assert_same,
    llama,
    plans_of,
    programs,
    switched_on,
    train,
    twins,
)
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches

LAYERS = 3
KEEPS_ALL = f"layers: {LAYERS} keep;"


@pytest.mark.parametrize("trained", [False, True])
def test_undo_restores_every_attribute(trained: bool) -> None:
    model = llama()
    before = tiny.describe(model)
    switched_on(model)
    assert tiny.describe(model) != before
    if trained:
        train(model.train())
        model.eval()
    sloth_backend.undo(model)
    assert tiny.describe(model) == before


@pytest.mark.parametrize("enabled", ["before", "after"])
def test_undo_gives_the_hosts_checkpointing_back(enabled: str) -> None:
    mine, stock = llama(), llama()
    if enabled == "before":
        checkpointed(mine)
    switched_on(mine)
    if enabled == "after":
        checkpointed(mine)
    checkpointed(stock)
    sloth_backend.undo(mine)
    described = [{name: own.keys() for name, own in tiny.describe(model).items()} for model in (mine, stock)]
    assert described[0] == described[1]
    assert_same(train(mine.train()), train(stock.train()))


def test_switching_on_again_replaces_the_programs(runs: list[Call]) -> None:
    mine, stock = twins(llama())
    train(mine, make_batches(1))
    switched_on(mine, memory="least")
    assert len(programs(mine)) == LAYERS
    del runs[:]
    assert_same(train(mine), train(stock))
    assert len(runs) == LAYERS * len(make_batches())
    assert not plans_of(mine)[0].reason.startswith(KEEPS_ALL)


@pytest.mark.parametrize("training", [False, True])
def test_the_random_numbers_of_a_run_are_left_alone(training: bool) -> None:
    model = llama(lora_dropout=0.1).train(training)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    switched_on(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_of_modules_are_left_alone() -> None:
    model = llama(lora_dropout=0.1).train()
    model.base_model.model.model.layers[1].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    switched_on(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_copy_trains_on_its_own() -> None:
    """With its own weights, and its gradients arrive at its own."""
    mine, stock = twins(llama())
    twin = copy.deepcopy(mine)
    for model in (twin, stock):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    expected = train(stock)
    assert_same(train(twin), expected)
    assert all(parameter.grad is None for parameter in mine.parameters())


def test_a_copy_outlives_its_original() -> None:
    mine, stock = twins(llama())
    twin, original = copy.deepcopy(mine), weakref.ref(mine)
    del mine
    gc.collect()
    assert original() is None
    assert_same(train(twin), train(stock))


def checkpointed(model: Any, **options: Any) -> None:
    """As a host does it for adapters over a frozen base."""
    model.gradient_checkpointing_enable(options or {"use_reentrant": False})
    model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_hosts_checkpointing_steps_aside(when: str, reentrant: bool, runs: list[Call]) -> None:
    """Each program runs once a pass: nobody runs it again for its backward."""
    model = llama(lora_dropout=0.1)
    if when == "before":
        checkpointed(model, use_reentrant=reentrant)
    mine, stock = twins(model)
    if when == "after":
        for each in (mine, stock):
            checkpointed(each, use_reentrant=reentrant)
    assert_same(train(mine, make_batches(2)), train(stock, make_batches(2)))
    assert len(runs) == 2 * LAYERS


def test_checkpointing_switched_off_again() -> None:
    mine, stock = twins(llama())
    checkpointed(mine)
    mine.gradient_checkpointing_disable()
    assert_same(train(mine), train(stock))


def test_evaluation_makes_no_plan(runs: list[Call]) -> None:
    mine, stock = twins(llama())
    batch = make_batches()[0]
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch, use_cache=False) for model in (mine, stock))
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert len(runs) == LAYERS
    assert not plans_of(mine)


def test_evaluation_between_forward_and_backward() -> None:
    mine, stock = twins(llama())
    first, second = make_batches(2)
    expected = train(stock, [first])
    torch.manual_seed(3)
    loss = mine(**first).loss
    with torch.no_grad():
        mine.eval()(**second)
    mine.train()
    loss.backward()
    found = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    assert_same({"loss": loss.detach()[None], **found}, expected)


def test_two_models_interleaved() -> None:
    pairs = [twins(llama(r=rank), memory=mode) for rank, mode in ((4, "least"), (2, "fastest"))]
    expected = [train(stock, make_batches(1)) for _, stock in pairs]
    losses = [mine(**make_batches(1)[0]).loss for mine, _ in pairs]
    for loss in losses:
        loss.backward()
    for (mine, _), loss, stock in zip(pairs, losses, expected, strict=True):
        found = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
        assert_same({"loss": loss.detach()[None], **found}, stock)
    assert [plans_of(mine)[0].reason.startswith(KEEPS_ALL) for mine, _ in pairs] == [False, True]


def test_nothing_holds_a_model_that_is_gone() -> None:
    model = switched_on(llama()).train()
    train(model, make_batches(1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
