"""Budgets between the least plan and the fastest, without a device: what fits is taken, and little is left over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.plugins.layer_programs.common import WHOLE_BLOCKS, adapted, quantised, switched_on
from integration_tests.sameness.architectures import make_model
from sloth_backend.plan import MemoryPlan
from sloth_plugins import layer_programs
from sloth_plugins.layer_programs import planner as planning
from sloth_plugins.layer_programs.costs import Shape

LAYERS, SHAPE, CPU = 16, Shape(1 << 18, 1024), torch.device("cpu")
SHARES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.85, 1.0)


class Planner:
    """Plans passes of ``SHAPE`` through a 4-bit model of ``LAYERS`` layers that are alike."""

    def __init__(self, made: planning.Planner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.patch = made, monkeypatch
        made.layers[1:] = made.layers[:1] * (LAYERS - 1)

    def plan(self, mode: str = "auto", budget: int | None = None) -> tuple[MemoryPlan, float]:
        """The plan, and the seconds it takes beyond the fastest layers."""
        self.patch.setattr(planning, "device_budget", lambda *args: budget)
        self.patch.setattr(self.made, "_mode", lambda device: mode)
        self.made.plans.clear()
        return self.made.planned(SHAPE, CPU), self.made.plans[SHAPE].seconds()


@pytest.fixture(params=[False, True], ids=["", "offload"])
def planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Planner:
    made: list[planning.Planner] = []

    def noted(*args: Any) -> planning.Planner:
        made.append(planning.Planner(*args))
        return made[-1]

    monkeypatch.setattr(layer_programs, "Planner", noted)
    switched_on(adapted(quantised(make_model("llama", **WHOLE_BLOCKS))))
    monkeypatch.setattr(made[0], "_host", lambda: (1 << 40) * request.param)
    return Planner(made[0], monkeypatch)


def test_a_budget_is_kept_and_used(planner: Planner) -> None:
    least, fastest = (planner.plan(mode)[0].predicted_peak_bytes for mode in ("least", "fastest"))
    assert fastest > 2 * least
    before = float("inf")
    for share in SHARES:
        room = int(least + share * (fastest - least))
        plan, seconds = planner.plan(budget=room)
        assert plan.fits
        assert plan.budget_bytes == room
        assert room - (fastest - least) / 10 < plan.predicted_peak_bytes <= room, (share, str(plan))
        assert seconds <= before
        before = seconds


def test_below_the_least_plan_nothing_fits(planner: Planner) -> None:
    least, _ = planner.plan("least")
    plan, _ = planner.plan(budget=least.predicted_peak_bytes - 1)
    assert not plan.fits
    assert plan.predicted_peak_bytes == least.predicted_peak_bytes
