"""A memory plan that another plugin makes: programs keep what it says, or a Finding says why they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from integration_tests.plugins.layer_programs.common import assert_same, gradients, llama, plans_of, train, twins
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches
from sloth_backend import hookimpl
from sloth_backend.manager import get_manager
from sloth_backend.plan import KEEP, OFFLOAD, RECOMPUTE, Level, MemoryPlan
from sloth_kernels import relief

LAYERS = 3
Answer = Callable[..., None]


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Lets a plugin answer ``sloth_memory_plan`` with one level a layer, for one test."""
    manager = get_manager()

    def register(*levels: Level, **options: Any) -> None:
        plan = MemoryPlan(levels, **options)
        manager.register(SimpleNamespace(sloth_memory_plan=hookimpl(lambda: plan)), "planner")

    yield register
    manager.pm.unregister(name="planner")


def kept_by(runs: list[Call]) -> list[frozenset[str] | None]:
    """What the layers kept in the first pass."""
    return [call.kept for call in runs[:LAYERS]]


def test_names_stand_for_values(answer: Answer, runs: list[Call]) -> None:
    answer(RECOMPUTE, KEEP, RECOMPUTE)
    mine, stock = twins(llama())
    runs.clear()
    assert_same(train(mine), train(stock))
    assert kept_by(runs) == [frozenset(), runs[1].program.savable, frozenset()]
    (finding, *_) = plans_of(mine)
    assert finding.reason.startswith("layers: 2 recompute, 1 keep; predicted peak")


def test_an_offloaded_layer_keeps_nothing(answer: Answer, runs: list[Call]) -> None:
    answer(OFFLOAD, OFFLOAD, RECOMPUTE)
    mine, stock = twins(llama(), memory="fastest")
    runs.clear()
    assert_same(train(mine), train(stock))
    assert kept_by(runs) == [frozenset()] * LAYERS


def test_values_count_before_names(answer: Answer, runs: list[Call]) -> None:
    some = frozenset({"a"})
    answer(Level("keep", some), Level("attention only", some, frozenset({"x"})), RECOMPUTE)
    mine, stock = twins(llama())
    runs.clear()
    assert_same(train(mine), train(stock))
    assert kept_by(runs) == [some, some, frozenset()]
    assert plans_of(mine)[0].reason.startswith("layers: 1 keep, 1 attention only, 1 recompute")


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ((KEEP, KEEP), "the memory plan has 2 layers, the model 3"),
        ((KEEP, Level("warm"), KEEP), "level 'warm' for model.layers.1 names neither values"),
        ((KEEP, Level("keep", frozenset({"tea"})), KEEP), "for model.layers.1 keeps tea; what can be kept is"),
        ((Level("keep", offloaded=frozenset({"a"})), KEEP, KEEP), "for model.layers.0 offloads a; what"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_named_and_replaced(
    answer: Answer, levels: tuple[Level, ...], reason: str
) -> None:
    answer(*levels)
    mine, stock = twins(llama(), memory="least")
    (finding,) = plans_of(mine)
    assert (finding.action, finding.plugin) == ("warned", "layer_programs")
    assert reason in finding.reason
    assert_same(train(mine), train(stock))
    assert plans_of(mine)[1].reason.startswith("layers: ")


def test_running_out_of_memory_ends_it(answer: Answer, runs: list[Call]) -> None:
    answer(KEEP, KEEP, KEEP)
    mine, stock = twins(llama())
    batch, expected = make_batches()[0], train(stock, make_batches()[:1])
    loss = mine(**batch).loss
    assert relief.relieve()
    loss.backward()
    assert_same({"loss": loss.detach()[None], **gradients(mine)}, expected)
    assert plans_of(mine)[1].reason.startswith("out of memory: kept values were given up")
    runs.clear()
    train(mine, [batch])
    assert [call.kept for call in runs[:LAYERS]] != [call.program.savable for call in runs[:LAYERS]]
