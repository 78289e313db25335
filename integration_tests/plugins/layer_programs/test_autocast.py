"""Plans under autocast: bytes are those of the dtype that it computes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.plugins.layer_programs.common import llama, train, twins
from integration_tests.sameness.architectures import make_batches
from sloth_kernels.program import Frame
from sloth_plugins.layer_programs.costs import Shape
from sloth_plugins.layer_programs.layer import Layer
from sloth_plugins.layer_programs.planner import Planner

BF16 = torch.bfloat16


@pytest.fixture
def planning(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Planner, Shape]]:
    """Who has planned, and for what."""
    seen: list[tuple[Planner, Shape]] = []
    original = Planner.planned

    def noted(self: Planner, shape: Shape, device: torch.device) -> Any:
        seen.append((self, shape))
        return original(self, shape, device)

    monkeypatch.setattr(Planner, "planned", noted)
    return seen


def test_products_take_half_of_float32_under_bf16(planning: list[tuple[Planner, Shape]]) -> None:
    mine, _ = twins(llama(), memory="fastest")
    batch = make_batches(1)
    train(mine, batch)
    with torch.autocast("cpu", BF16):
        train(mine, batch)
    (planner, plain), (_, under) = planning
    assert (plain.autocast, under.autocast) == (None, BF16)
    assert plain[:2] == under[:2]
    assert len(planner.traced[BF16]) == len(planner.layers)
    for layer, traced in zip(planner.layers, planner.traced[BF16], strict=True):
        assert layer.widths.keys() == traced.widths.keys()
        for name in ("gate", "up", "v", "a"):
            assert traced.widths[name] == layer.widths[name] / 2
        assert traced.widths["x"] == layer.widths["x"]
    peaks = [planner.plans[shape].plan.predicted_peak_bytes for shape in (plain, under)]
    assert peaks[1] < peaks[0]


def test_the_bytes_are_those_that_a_pass_keeps(
    planning: list[tuple[Planner, Shape]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, int]] = []
    original = Frame.run_forward

    def noted(self: Frame, *arguments: Any) -> torch.Tensor:
        y = original(self, *arguments)
        held.append({k: v.nbytes for k, v in self.values.items() if isinstance(v, torch.Tensor)})
        return y

    mine, _ = twins(llama(), memory="fastest")
    with torch.autocast("cpu", BF16):
        train(mine, make_batches(1))
        monkeypatch.setattr(Frame, "run_forward", noted)
        train(mine, make_batches(1))
    ((planner, shape), _) = planning
    first = held[0]
    assert {"gate", "up"} <= first.keys()
    widths = planner.traced[BF16][0].widths
    assert first == {name: int(widths[name] * shape.tokens) for name in first}


def test_weights_that_are_elsewhere_are_no_reason_to_stop(
    planning: list[tuple[Planner, Shape]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Layer, device: torch.device) -> Layer:
        raise RuntimeError("no weight is here, the test says")

    mine, _ = twins(llama())
    monkeypatch.setattr(Layer, "traced_again", fail)
    with torch.autocast("cpu", BF16):
        train(mine, make_batches(1))
    ((planner, _),) = planning
    assert [layer.widths for layer in planner.traced[BF16]] == [layer.widths for layer in planner.layers]
    assert "the memory plan counts bytes as without autocast: no weight is here, the test says" in caplog.text


def test_looking_again_draws_no_masks(planning: list[tuple[Planner, Shape]]) -> None:
    """The first pass under autocast, in which values are looked at, is like the second, in which they are not."""
    mine, _ = twins(llama(lora_dropout=0.1), memory="fastest")
    modes = {name: module.training for name, module in mine.named_modules()}
    with torch.autocast("cpu", BF16):
        first, second = (train(mine, make_batches(1)) for _ in range(2))
    assert planning[0][0].traced.keys() == {None, BF16}
    assert modes == {name: module.training for name, module in mine.named_modules()}
    assert all(torch.equal(first[name], second[name]) for name in first)
