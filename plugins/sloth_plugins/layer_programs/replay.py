"""Which passes are played from recordings: short ones, whose host is the limit, once their shape has come before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sloth_backend.findings import Finding
from sloth_backend.plan import MemoryPlan
from sloth_kernels.recording import Capture, Tape
from sloth_kernels.relief import givers
from sloth_kernels.schedule import INPUT
from sloth_plugins.layer_programs.costs import Shape
from sloth_plugins.layer_programs.planner import Planner

SEEN = 1
"""Passes of a form before one is recorded: by then its kernels are compiled and loaded."""
CAPABILITY = "memory_plan"
SHORT = "short passes"
PLAYED = "their layers are launched as recordings (CUDA graphs), around attention, once a size has come before"


class Form(NamedTuple):
    """What passes have in common that launch the same kernels."""

    size: torch.Size
    autocast: torch.dtype | None
    kept: tuple[frozenset[str], ...]
    """By layer."""
    cached_layers: int


class Replays:
    """The tapes of one model, for passes of each form that is worth it, while memory allows.

    Recordings of all forms share their memory: it holds what one pass needs.

    Args:
        planner: of its passes.
        capture: the device's; None where nothing can be recorded.
        say: takes a Finding of what is done, or why not.
    """

    def __init__(self, planner: Planner, capture: Capture | None, say: Callable[[Finding], None]) -> None:
        self.planner, self.capture, self.say = planner, capture, say
        self.known: dict[Form, Tapes] = {}
        self.seen: Counter[Form] = Counter()
        self.last: Tapes | None = None
        givers.add(self)

    def tapes(self, x: torch.Tensor, shape: Shape, plan: MemoryPlan) -> Tapes | None:
        """Those for a pass that begins with ``x`` (B, S, H); None where it launches every kernel by itself."""
        if self.capture is None or not self.planner.transient or not self._is_over():
            return None
        form = _form(x, shape, plan)
        if form not in self.known:
            self.seen[form] += 1
            if self.seen[form] <= SEEN or not self._is_worth_it(shape, plan):
                return None
            if not self.known:
                self.say(Finding("changed", SHORT, PLAYED, CAPABILITY))
            self.known[form] = Tapes(self.capture, len(plan.levels))
        self.last = self.known[form]
        return self.last

    def _is_over(self) -> bool:
        """Whether nobody needs the last pass any more, and others may use its memory; and whether it worked."""
        if self.last is None:
            return True
        if self.last.playing():
            return False
        if reason := self.last.broken():
            self.say(Finding("warned", SHORT, f"launched kernel by kernel: cannot be recorded: {reason}", CAPABILITY))
            self.give_up()
            return False
        self.last.lend()
        return True

    def _is_worth_it(self, shape: Shape, plan: MemoryPlan) -> bool:
        # Of long passes, which are not, this is asked every time: what walks the model comes last.
        if not self.planner.waits_for_host(shape) or any(level.offloaded or level.tile_rows for level in plan.levels):
            return False
        # What layers keep, and a layer's output, its gradient, and what attention made that is copied.
        hidden = int(self.planner.traced[shape.autocast][0].widths[INPUT] * shape.tokens)
        needed = sum(max(0, level.device_bytes) + 4 * hidden for level in plan.levels)
        peak = max(chosen.plan.predicted_peak_bytes for chosen in self.planner.plans.values())
        if plan.budget_bytes is not None and peak + needed > plan.budget_bytes:
            return False
        return not self.planner.is_sharded()  # a recording reads parameters where they were

    def give_up(self) -> bool:
        """Let go of all recordings and make none from now on; whether there were any."""
        had = bool(self.known)
        self.stop()
        return had

    def stop(self) -> None:
        """As ``give_up``."""
        self.known, self.capture, self.last = {}, None, None


def _form(x: torch.Tensor, shape: Shape, plan: MemoryPlan) -> Form:
    """What a pass launches follows from its size and its plan; neither from the longest document nor from its step."""
    kept = tuple(level.kept for level in plan.levels)
    return Form(x.shape, shape.autocast, kept, plan.cached_layers)


class Tapes:
    """A tape for each layer, and the constants that all layers read.

    Args:
        capture: the device's.
        layers: how many.
    """

    def __init__(self, capture: Capture, layers: int) -> None:
        self.fixed: set[int] = set()
        self.layers = [Tape(capture, self.fixed) for _ in range(layers)]
        self._placed: dict[str, torch.Tensor] = {}
        self._sources: dict[str, Any] = {}

    def playing(self) -> bool:
        """Whether a pass still needs what it has played."""
        return any(tape.playing is not None and tape.playing() is not None for tape in self.layers)

    def broken(self) -> str:
        """Why a layer could not be recorded."""
        return next((tape.broken for tape in self.layers if tape.broken), "")

    def lend(self) -> None:
        """Let recordings of other passes use the memory, once this pass is over."""
        for tape in self.layers:
            tape.lend()

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
