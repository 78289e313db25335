"""Memory that runs out: values are given up, the plan becomes tighter, the gradients stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.plugins.layer_programs.common import (
    WHOLE_BLOCKS,
    adapted,
    assert_same,
    llama,
    plans_of,
    quantised,
    train,
    twins,
)
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_kernels import launch
from sloth_kernels.ops import linear_cross_entropy

LAYERS = 3


class Scarce:
    """A bound stage whose ``method`` runs out of memory while ``times`` is not empty; ``late``: when all is done."""

    def __init__(self, bound: Any, method: str, times: list[int], late: bool) -> None:
        self.bound, self.method, self.times, self.late = bound, method, times, late
        self.operands = bound.operands

    def forward(self, *inputs: Any) -> Any:
        return self._run("forward", inputs)

    def backward(self, *arguments: Any) -> Any:
        return self._run("backward", arguments)

    def _run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == self.method and self.times:
            self.times.pop()
            if self.late:
                getattr(self.bound, method)(*arguments)
            raise torch.OutOfMemoryError("no memory left, the test says")
        return getattr(self.bound, method)(*arguments)


def run_out(
    call: Call, method: str, at: int, monkeypatch: pytest.MonkeyPatch, count: int = 1, late: bool = False
) -> list[int]:
    """From now on stage ``at`` of the call's program runs out of memory, ``count`` times; what is left of them."""
    stage, times = call.program.stages[at], [1] * count
    bind = stage.bind
    monkeypatch.setattr(stage, "bind", lambda autocast: Scarce(bind(autocast), method, times, late))
    return times


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("method", "layer"), [("forward", -1), ("backward", -1), ("backward", 1)])
@pytest.mark.parametrize("at", [1, 3, -2])
def test_the_gradients_stay_and_the_plan_becomes_tighter(
    method: str, layer: int, at: int, dropout: float, runs: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, stock = twins(llama(lora_dropout=dropout), memory="fastest")
    batches, expected = make_batches(), train(stock)
    train(mine, batches[:1])
    before = runs[:LAYERS]
    run_out(before[layer], method, at, monkeypatch)
    del runs[:]
    assert_same(train(mine, batches), expected)
    warned = [finding.reason for finding in plans_of(mine) if finding.action == "warned"]
    assert len(warned) == 1
    assert warned[0].startswith("out of memory: kept values were given up, from now on layers: ")
    after = [call.kept for call in runs[-LAYERS:]]
    assert after != [call.kept for call in before]
    assert all(now <= then.kept for now, then in zip(after, before, strict=True))


@pytest.mark.skipif(
    launch.interpreting(), reason="what kernels overwrite they overwrite last, with nothing left to fail"
)
@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("at", range(9))
def test_every_stage_can_start_over(
    at: int, method: str, in_4bit: bool, runs: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far it came: nothing that it was given has changed, and its masks are drawn once."""
    model = quantised(make_model("llama", **WHOLE_BLOCKS)) if in_4bit else make_model("llama")
    mine, stock = twins(adapted(model, lora_dropout=0.0 if in_4bit else 0.1), memory="fastest")
    batch = make_batches(1)
    expected = train(stock, batch)
    train(mine, batch)
    assert len(runs[-1].program.stages) == 9
    left = run_out(runs[-1], method, at, monkeypatch, late=True)
    assert_same(train(mine, batch), expected)
    assert not left


@pytest.mark.parametrize("mode", ["auto", "fastest"])
def test_other_lengths_are_planned_with_less_too(mode: str, runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = twins(llama(), memory=mode)
    batch, long = make_batches(1), make_batches(1, length=40)
    train(mine, [*batch, *long])
    fastest = [call.kept for call in runs[LAYERS:]]
    run_out(runs[-1], "forward", 1, monkeypatch)
    train(mine, batch)
    del runs[:]
    train(mine, long)
    assert [call.kept for call in runs] != fastest


def test_again_and_again_it_ends_at_the_least_plan(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step down is said once, and at the bottom there is nothing more to say."""
    mine, stock = twins(llama(), memory="fastest")
    batch = make_batches(1)
    expected = train(stock, batch)
    for _ in range(40):
        del runs[:]
        assert_same(train(mine, batch), expected)
        said, kept = len(plans_of(mine)), [call.kept for call in runs]
        run_out(runs[-1], "forward", 1, monkeypatch)
        assert_same(train(mine, batch), expected)
        if len(plans_of(mine)) == said:
            break
    else:
        pytest.fail("40 steps and no end")
    least, _ = twins(llama(), memory="least")
    del runs[:]
    train(least, batch)
    assert kept == [call.kept for call in runs]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_loss_starts_over_too(dropout: float, runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, stock = twins(llama(lora_dropout=dropout), memory="fastest")
    batches, expected = make_batches(), train(stock)
    train(mine, batches[:1])
    before = [call.kept for call in runs]
    original, times = linear_cross_entropy._forward, [1]

    def scarce(*arguments: Any) -> Any:
        result = original(*arguments)
        if times:
            times.pop()
            raise torch.OutOfMemoryError("no memory left, the test says")
        return result

    monkeypatch.setattr(linear_cross_entropy, "_forward", scarce)
    assert_same(train(mine, batches), expected)
    assert not times
    (warned,) = (finding.reason for finding in plans_of(mine) if finding.action == "warned")
    assert warned.startswith("out of memory: kept values were given up, from now on layers: ")
    after = [call.kept for call in runs[-LAYERS:]]
    assert after != before
    assert all(now <= then for now, then in zip(after, before, strict=True))


def test_dense_weights_go_when_nothing_else_is_left(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, stock = twins(adapted(quantised(make_model("llama", **WHOLE_BLOCKS))), memory="fastest")
    batch = make_batches(1)
    assert_same(train(mine, batch), train(stock, batch), tolerance=1e-3)
    run_out(runs[0], "backward", 1, monkeypatch)
    assert_same(train(mine, batch), train(stock, batch), tolerance=1e-3)
    (warned,) = (finding.reason for finding in plans_of(mine) if finding.action == "warned")
    assert warned.startswith("out of memory: kept values were given up, from now on layers: ")
    assert_same(train(mine, batch), train(stock, batch), tolerance=1e-3)


def test_the_first_layer_has_nothing_to_give_up(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """No other layer holds anything yet: the stage is tried once more, and what then fails is the host's to see."""
    mine, _ = twins(llama())
    train(mine, make_batches(1))
    run_out(runs[0], "forward", 1, monkeypatch, count=2)
    with pytest.raises(torch.OutOfMemoryError):
        mine(**make_batches(1)[0])
