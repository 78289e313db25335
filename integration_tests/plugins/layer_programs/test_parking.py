"""Inputs and kept values that wait in host memory, over a device that does nothing before somebody waits for it."""

from __future__ import annotations

from typing import Any

import pytest

import sloth_backend
from integration_tests.plugins import offloading
from integration_tests.plugins.lazy_device import LazyDevice, make_rings, ring_of
from sloth_backend.plan import Costs, Level, MemoryPlan
from sloth_kernels import program
from sloth_plugins.layer_programs import costs, passes, planner

BATCHES = [offloading.batch(12, seed=seed) for seed in range(2)]


class Parking:
    """Every layer of the models that are optimised from now on sends away what ``away`` chooses of its levels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: frozenset[str]) -> None:
        self.device, self.wanted = LazyDevice(), wanted
        self.rings = make_rings(self.device, min_bytes=1)
        original = passes.Passes.__init__

        def with_rings(this: Any, model: Any, layers: Any, planner: Any, cache: Any, rings: Any, *rest: Any) -> None:
            planner.offloads = True
            original(this, model, layers, planner, cache, self.rings, *rest)

        monkeypatch.setattr(passes.Passes, "__init__", with_rings)
        monkeypatch.setattr(planner.plans, "choose", self.choose)
        monkeypatch.setattr(costs, "MIN_BYTES", 1)

    def choose(self, of: Costs, *_: Any) -> MemoryPlan:
        return MemoryPlan(tuple(self.level(levels) for levels in of.layers))

    def level(self, levels: tuple[Level, ...]) -> Level:
        """Keep what is wanted and send it away, with the input."""
        kept = self.wanted | {name for name in levels[0].kept if "." in name}
        return Level("parked", kept, self.wanted | {"x"})


@pytest.mark.parametrize(
    "wanted", [set(), {"x2"}, {"a", "x2"}, {"q", "k", "v", "a", "x2"}, {"gate", "up", "h", "q", "k", "v", "a", "x2"}]
)
def test_what_waits_in_host_memory_comes_back_right(wanted: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        model = sloth_backend.optimize(offloading.make_lora(), config={"print_report": False})
        return offloading.train(model, BATCHES)

    here = run()
    parking = Parking(monkeypatch, frozenset(wanted))
    there = run()
    offloading.assert_same(there, here)
    assert not parking.device.violations
    assert ring_of(parking.rings).memory.bytes_used == 0
    assert ring_of(parking.rings).memory.bytes_held > 0


def test_levels_send_away_all_that_they_keep() -> None:
    """Where that is worth a copy."""
    model = sloth_backend.optimize(offloading.make_lora(), config={"print_report": False, "memory": "least"})
    seen: list[tuple[Level, ...]] = []
    original = planner.levels_of
    try:
        planner.levels_of = lambda estimates: seen.append(original(estimates)) or seen[-1]  # type: ignore[func-returns-value]
        model(**offloading.batch(64, rows=512)).loss.backward()
    finally:
        planner.levels_of = original
    away = [level for level in seen[0] if level.offloaded - {"x"}]
    assert away
    for level in away:
        assert level.offloaded - {"x"} <= level.kept
        assert level.host_bytes > 0


def test_a_value_is_on_the_device_only_from_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP's backward runs before anything of the attention comes back."""
    Parking(monkeypatch, frozenset({"a", "x2"}))
    model = sloth_backend.optimize(offloading.make_lora(num_hidden_layers=1), config={"print_report": False})
    order: list[str] = []
    missing = program.Values.__missing__
    monkeypatch.setattr(program.Values, "__missing__", lambda self, name: order.append(name) or missing(self, name))
    model(**BATCHES[0]).loss.backward()
    assert order[0] == "x2"
    assert set(order) == {"x2", "a", "x"}
