"""The layers of a model, pass by pass, each by its level of the pass's plan."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from sloth_backend import plan as plans
from sloth_backend.findings import Finding
from sloth_backend.phases import find_session
from sloth_backend.plan import Level, MemoryPlan
from sloth_kernels.dense_cache import DenseCache
from sloth_kernels.program import INPUT
from sloth_kernels.recording import Capture
from sloth_kernels.values import Park
from sloth_plugins.kernel_patching.loss import limit_logits
from sloth_plugins.layer_programs.costs import Shape
from sloth_plugins.layer_programs.first_input import FirstInput
from sloth_plugins.layer_programs.layer import Layer, shape_of
from sloth_plugins.layer_programs.planner import Planner
from sloth_plugins.layer_programs.replay import CAPABILITY, Replays, Tapes
from sloth_plugins.offloaded_checkpointing.ring import Handle, Kept
from sloth_plugins.offloaded_checkpointing.seam import Rings, held_by

SETTLED = 6
"""The pass before which the measured peak is looked at: gradients and optimizer state exist by then."""

log = logging.getLogger("sloth_backend")


class Passes:
    """Runs the layers of one model, pass by pass.

    Args:
        model: the causal language model.
        layers: its programs, in the order in which they run.
        planner: of its passes.
        cache: where dense copies of quantised weights are kept.
        rings: where offloaded inputs wait; None where nothing is offloaded.
        capture: what records short passes; None to launch every kernel by itself.
        first: knows whether anybody wants the gradient of the first layer's input; None where somebody may.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        planner: Planner,
        cache: DenseCache,
        rings: Rings | None,
        capture: Capture | None = None,
        first: FirstInput | None = None,
    ) -> None:
        self.replays = Replays(planner, capture, self._say)
        self.tapes: Tapes | None = None
        self.model, self.first = weakref.ref(model), first
        self.layers, self.planner, self.cache, self.rings = list(layers), planner, cache, rings
        cache.on_relief = self._tighten
        self.passed: dict[Shape, MemoryPlan] = {}
        """The plans that passes ran under."""
        self.shape: Shape | None = None
        self.plan: MemoryPlan | None = None
        self.to_come: list[int] = []
        """How many values of this pass go to host memory from each layer on."""
        self.last = -1
        """The layer that ran last: a pass is over when one that is not above it runs."""
        self.seen = -1
        """The same with passes without gradients."""
        self.count = 0
        self.began = True
        """Whether the last pass began a step; a pass that begins one is taken to be all of it if the last did too."""
        self.warned = set[Finding]()

    def run_layer(self, index: int, x: torch.Tensor, constants: Mapping[str, Any]) -> torch.Tensor:
        """The output of layer ``index`` for its input (B, S, H)."""
        programs = self.layers[index].programs
        if index <= self.seen:
            self.cache.expire()
        self.seen = index
        if not torch.is_grad_enabled():
            return programs[0](x, constants)
        if index <= self.last or self.plan is None:
            self._begin(x, constants.get("mask"))
        self.last = index
        assert self.plan is not None
        level = self.plan.levels[index]
        program = programs[level.tile_rows]
        if index == 0 and self.first is not None and self.first.is_nobodys_wish(x, program):
            x = x.detach()
        tape = None
        if self.tapes is not None:
            tape, constants = self.tapes.layers[index], self.tapes.placed(constants)
        with self._offloading(level, index, x):
            y = program(x, constants, level.kept, self._tighten, self._park(level, index), tape)
        if self.rings is not None and self.to_come[0] and not self.to_come[index]:
            self.rings.settle()
        return y

    def warn(self, finding: Finding) -> None:
        """Say it, once."""
        if finding not in self.warned:
            self.warned.add(finding)
            self._say(finding)

    def _begin(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        began = self.planner.begins_a_step()
        shape, self.began = shape_of(x, mask, alone=began and self.began), began
        self.plan, self.shape = self.planner.planned(shape, x.device), shape
        self.cache.hold(self.plan.cached_layers)
        self.tapes = self.replays.tapes(x, shape, self.plan)
        away = [len(level.offloaded) for level in self.plan.levels]
        self.to_come = list(accumulate(reversed(away)))[::-1]
        if self.rings is not None:
            self.rings.depth = max([1, *away])
        limit_logits(*self.planner.plans[shape].loss_tile)
        self.count += 1
        self.passed[shape] = self.plan
        if self.count == 1:
            self._say(plans.planned(self.plan))
        if self.count == SETTLED and x.is_cuda:
            largest = max(self.passed.values(), key=lambda plan: plan.predicted_peak_bytes)
            self._say(plans.measured(largest, torch.cuda.max_memory_allocated(x.device)))

    def _offloading(self, level: Level, index: int, x: torch.Tensor) -> Any:
        """Saved-tensor hooks that hand the layer's input to a ring, where its level says so."""
        if self.rings is None or not self.to_come[0]:
            return nullcontext()
        return held_by(self.rings, (x,), self.to_come[index] if INPUT in level.offloaded else 0)

    def _park(self, level: Level, index: int) -> Park | None:
        """The way of kept values to host memory, where the level sends some."""
        names, rings, to_come = level.offloaded - {INPUT}, self.rings, self.to_come[index]
        if not names or rings is None:
            return None

        def put(value: torch.Tensor) -> Handle | Kept:
            return rings.save((value,), to_come).get(id(value)) or Kept(value)

        return Park(names, put)

    def _tighten(self) -> None:
        """Plan the rest of the run with less; called when kept values had to be given up."""
        if self.shape is None or self.plan is None:
            return
        tighter = self.planner.tighten(self.shape, self.plan)
        if tighter is not None:
            self.passed = {self.shape: tighter}
            words = f"out of memory: kept values were given up, from now on {plans.describe(tighter)}"
            self._say(Finding("warned", "memory", words, CAPABILITY))

    def _say(self, finding: Finding) -> None:
        """Into the report, which is printed before this is known, and into the log."""
        model = self.model()
        session = find_session(model) if model is not None else None
        if session is not None:
            session.findings.append(replace(finding, plugin="layer_programs"))
        log.log(logging.WARNING if finding.action == "warned" else logging.INFO, "%s", finding.reason)
