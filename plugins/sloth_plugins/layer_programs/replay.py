"""Which passes are played from recordings: short ones, whose host is the limit, once their shape has come before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from sloth_backend.plan import MemoryPlan
from sloth_kernels.recording import Capture, Tape
from sloth_kernels.relief import givers
from sloth_kernels.schedule import INPUT
from sloth_plugins.layer_programs.costs import Shape
from sloth_plugins.layer_programs.planner import Planner

SEEN = 2
"""Passes of a shape before one is recorded: by then its kernels are compiled and loaded."""


class Replays:
    """The tapes of one model, for passes of each shape that is worth it, while memory allows.

    Args:
        planner: of its passes.
        capture: the device's; None where nothing can be recorded.
    """

    def __init__(self, planner: Planner, capture: Capture | None) -> None:
        self.planner, self.capture = planner, capture
        self.known: dict[Shape, Tapes] = {}
        self.seen: Counter[Shape] = Counter()
        self.bytes = 0
        givers.add(self)

    def tapes(self, shape: Shape, plan: MemoryPlan) -> Tapes | None:
        """Those for a pass that begins; None where it launches every kernel by itself."""
        if self.capture is None or not self.planner.transient:
            return None
        if shape not in self.known:
            self.seen[shape] += 1
            if self.seen[shape] <= SEEN or not self._is_worth_it(shape, plan):
                return None
            self.known[shape] = Tapes(self.capture, plan)
        found = self.known[shape]
        if any(tape.broken for tape in found.layers):
            self.give_up()
            return None
        return found if found.plan is plan and not found.playing() else None

    def _is_worth_it(self, shape: Shape, plan: MemoryPlan) -> bool:
        if any(level.offloaded or level.tile_rows for level in plan.levels):
            return False
        # What layers keep, and a layer's output, its gradient, and what attention made that is copied.
        hidden = int(self.planner.traced[shape.autocast][0].widths[INPUT] * shape.tokens)
        needed = sum(max(0, level.device_bytes) + 4 * hidden for level in plan.levels)
        peak = max(chosen.plan.predicted_peak_bytes for chosen in self.planner.plans.values())
        fits = plan.budget_bytes is None or peak + self.bytes + needed <= plan.budget_bytes
        if not fits or not self.planner.waits_for_host(shape):
            return False
        self.bytes += needed
        return True

    def give_up(self) -> bool:
        """Let go of all recordings and make none from now on; whether there were any."""
        had = bool(self.known)
        self.stop()
        return had

    def stop(self) -> None:
        """As ``give_up``."""
        self.known, self.capture, self.bytes = {}, None, 0


class Tapes:
    """A tape for each layer, for passes under ``plan``, and the constants that all layers read."""

    def __init__(self, capture: Capture, plan: MemoryPlan) -> None:
        self.plan = plan
        self.fixed: set[int] = set()
        self.layers = [Tape(capture, self.fixed) for _ in plan.levels]
        self._placed: dict[str, torch.Tensor] = {}
        self._sources: dict[str, Any] = {}

    def playing(self) -> bool:
        """Whether a pass still needs what it has played."""
        return any(tape.playing is not None and tape.playing() is not None for tape in self.layers)

    def placed(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """``constants`` where recordings read them: copied once for all layers of a pass."""
        return {name: self._place(name, value) for name, value in constants.items()}

    def _place(self, name: str, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return value
        if name not in self._placed:
            self._placed[name] = value.clone()
            self.fixed.add(self._placed[name].data_ptr())
        elif self._sources[name] is not value:
            self._placed[name].copy_(value)
        self._sources[name] = value
        return self._placed[name]
