"""Short passes played from recordings: the numbers of passes that launch every kernel, and when there are none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.layer_programs.common import assert_same, llama, switched_on, twins
from integration_tests.recordings import Refuses, Repeats
from integration_tests.sameness.architectures import make_batches
from sloth_kernels import recording
from sloth_kernels.documents import remember
from sloth_plugins.layer_programs import passes as passes_module
from sloth_plugins.layer_programs.replay import SEEN, Replays
from sloth_plugins.program_layers import planner_of

LAYERS = 3
PARTS = 4
"""Recordings a layer: before and after attention, forward and backward."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Replays]:
    """The Replays of models that are switched on, each with a device that repeats."""
    found: list[Replays] = []

    class Noted(Replays):
        def __init__(self, planner: Any, capture: Any, say: Any) -> None:
            super().__init__(planner, Repeats(), say)
            found.append(self)

    monkeypatch.setattr(passes_module, "Replays", Noted)
    return found


@contextmanager
def transient(model: Any) -> Iterator[None]:
    planner = planner_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    planner.transient = True
    yield
    planner.transient = False


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None].clone(), **found}


@pytest.mark.parametrize("memory", ["fastest", "least"])
@pytest.mark.parametrize("lora", [True, False])
def test_numbers_are_those_of_passes_that_launch_every_kernel(made: list[Replays], memory: str, lora: bool) -> None:
    mine, stock = twins(llama() if lora else tiny.make_model(tiny.make_tokenizer()), memory=memory)
    replays, batches = made[-1], make_batches(SEEN + 4)
    capture: Any = replays.capture
    with transient(mine):
        for number, batch in enumerate(batches):
            assert_same(gradients(mine, batch), gradients(stock, batch))
            with torch.no_grad():
                for a, b in zip(mine.parameters(), stock.parameters(), strict=True):
                    if a.requires_grad:
                        a.add_(1e-3 * torch.ones_like(a))
                        b.add_(1e-3 * torch.ones_like(b))
            assert bool(capture.recorded) == (number >= SEEN)
    # Where attention is computed again, backward has more parts.
    layers = mine.config.num_hidden_layers
    assert capture.recorded >= layers * PARTS
    assert capture.recorded == layers * PARTS or memory == "least"
    assert capture.played == 4 * capture.recorded


@pytest.mark.parametrize("most", [0, recording.PACKED_BYTES])
def test_gradients_outlive_the_next_pass(made: list[Replays], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PACKED_BYTES", most)
    mine, stock = twins(llama())
    batches = make_batches(SEEN + 4)
    with transient(mine):
        for model in (mine, stock):
            for batch in batches:
                model(**batch).loss.backward()
    assert made[-1].known
    named = zip(mine.named_parameters(), stock.parameters(), strict=True)
    pairs = [(name, a.grad, b.grad) for (name, a), b in named if a.requires_grad]
    assert_same({name: a for name, a, _ in pairs}, {name: b for name, _, b in pairs})


def test_only_where_somebody_says_that_nothing_is_kept(made: list[Replays]) -> None:
    model = switched_on(llama()).train()
    for batch in make_batches(SEEN + 2):
        gradients(model, batch)
    assert not made[-1].known


def test_a_pass_whose_backward_is_to_come_is_not_overwritten(made: list[Replays]) -> None:
    mine, stock = twins(llama())
    first, second, *before = make_batches(SEEN + 4)
    with transient(mine):
        for batch in before:
            gradients(mine, batch)
        losses = [model(**first).loss for model in (mine, stock)]
        assert_same(gradients(mine, second), gradients(stock, second))
        for model, loss in zip((mine, stock), losses, strict=True):
            model.zero_grad()
            loss.backward()
    assert made[-1].known
    named = zip(mine.named_parameters(), stock.parameters(), strict=True)
    pairs = [(name, a.grad, b.grad) for (name, a), b in named if a.requires_grad]
    assert_same({name: a for name, a, _ in pairs}, {name: b for name, _, b in pairs})


def test_a_replaced_adapter_is_recorded_anew(made: list[Replays]) -> None:
    mine, stock = twins(llama())
    batches = make_batches(SEEN + 4)
    with transient(mine):
        for batch in batches[:-2]:
            gradients(mine, batch)
        capture: Any = made[-1].capture
        recorded = capture.recorded
        for model in (mine, stock):
            adapter = next(m for m in model.modules() if hasattr(m, "lora_A"))
            adapter.scaling["default"] *= 2
            weight = adapter.lora_B["default"].weight
            adapter.lora_B["default"].weight = torch.nn.Parameter(torch.ones_like(weight))
        for batch in batches[-2:]:
            assert_same(gradients(mine, batch), gradients(stock, batch))
    assert recorded < capture.recorded < 2 * recorded


def test_passes_of_documents_of_one_size_share_recordings(made: list[Replays]) -> None:
    model = llama()
    mine, launching = (switched_on(copy.deepcopy(model)).train() for _ in range(2))
    with transient(mine):
        for lengths in ((5, 7, 4), (4, 4, 8), (6, 6, 4), (8, 5, 3), (3, 8, 5)):
            batch = documents(lengths)
            assert_same(gradients(mine, batch), gradients(launching, batch))
    capture: Any = made[0].capture
    assert capture.recorded == LAYERS * PARTS
    assert capture.played == 4 * LAYERS * PARTS


def test_passes_of_other_sizes_have_recordings_of_their_own_in_the_same_memory(made: list[Replays]) -> None:
    model = llama()
    mine, launching = (switched_on(copy.deepcopy(model)).train() for _ in range(2))
    capture: Any = made[0].capture
    with transient(mine):
        for lengths in ((5, 7, 4), (3, 8), (4, 4, 8), (6, 5), (8, 8), (4, 7)):
            batch = documents(lengths)
            assert_same(gradients(mine, batch), gradients(launching, batch))
    assert capture.recorded == 2 * LAYERS * PARTS
    assert capture.lent


def documents(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(sum(lengths) + lengths[0])
    ids = torch.randint(3, 90, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    remember(positions, lengths)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def test_a_device_that_cannot_record_launches_every_kernel(made: list[Replays]) -> None:
    mine, stock = twins(llama())
    made[-1].capture = Refuses()
    with transient(mine):
        for batch in make_batches(SEEN + 3):
            assert_same(gradients(mine, batch), gradients(stock, batch))
    assert not made[-1].known
    (said,) = [f for f in sloth_backend.report(mine).findings if f.subject == "short passes" and f.action == "warned"]
    assert "not permitted when stream is capturing" in said.reason


def test_undo_lets_go_of_them(made: list[Replays]) -> None:
    model = switched_on(llama()).train()
    with transient(model):
        for batch in make_batches(SEEN + 2):
            gradients(model, batch)
    assert made[-1].known
    sloth_backend.undo(model)
    assert not made[-1].known
