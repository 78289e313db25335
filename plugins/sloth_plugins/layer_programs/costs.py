"""What the ways to run a program cost: bytes from a run that was observed, seconds from a simple model of the device.

The model need only rank the ways: matrix products at one rate, everything else at the speed of memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sloth_backend.plan import Level
from sloth_kernels.program import INPUT, OUTPUT, Program
from sloth_kernels.tiles import Tiled
from sloth_plugins.offloaded_checkpointing.ring import AHEAD

FLOPS, BYTES, LINK_BYTES = 600e12, 3e12, 50e9
"""A second's products, device traffic and traffic to the host (one H200); only their ratios matter to a plan."""

TILE_SHARE = 0.05
"""What products of few rows, and weights made dense for each tile, cost more."""

MIN_BYTES = 1 << 20
"""Smaller values stay on the device: moving one costs more than it frees."""

OFFLOAD_SHARE = 0.02
"""What offloading costs of a layer's time where its copies hide behind the work, measured generously."""


def widths(values: Mapping[str, Any], x: torch.Tensor) -> dict[str, float]:
    """Bytes a token of every value of a traced run, and of its input."""
    tokens = x.numel() // x.shape[-1]
    return {name: _bytes(value) / tokens for name, value in {**values, INPUT: x}.items()}


def parkable(values: Mapping[str, Any]) -> frozenset[str]:
    """The values of a traced run that a copy to host memory can stand for: whole tensors with memory of their own."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return frozenset(
        name
        for name, tensor in tensors.items()
        if tensor.is_contiguous() and owners[tensor.untyped_storage().data_ptr()] == 1 and "." not in name
    )


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


class Shape(NamedTuple):
    """What a pass looks like to a layer."""

    tokens: int
    length: int
    autocast: torch.dtype | None = None
    """What autocast computes in around it; None where it is off."""
    alone: bool = False
    """Whether it is all of its step: no gradient of an earlier pass is there when it begins."""


class StageCost(NamedTuple):
    """Of one stage: seconds of its forward, bytes it takes beside its values, seconds it repeats in its backward."""

    seconds: float
    workspace: int
    hidden: float


class Estimate:
    """Costs of one program, for passes of one shape.

    Args:
        program: the layer's.
        widths: bytes a token of each of its values.
        shape: of the pass.
        parkable: those of its values that may wait in host memory.
        gradient_bytes: of its operands, which autograd adds to those of earlier passes when its backward is over. A
            pass that is alone has none until then, though they count among the fixed bytes.
    """

    def __init__(
        self,
        program: Program,
        widths: Mapping[str, float],
        shape: Shape,
        parkable: frozenset[str] = frozenset(),
        gradient_bytes: int = 0,
    ) -> None:
        self.program, self.gradient_bytes = program, gradient_bytes
        self.still_free = gradient_bytes if shape.alone else 0
        self.size = {name: int(width * shape.tokens) for name, width in widths.items()}
        self.root = {name: stage.reads[0] for stage in program.stages if stage.views for name in stage.writes}  # type: ignore[attr-defined]
        costs = [self._stage(stage, widths, shape) for stage in program.stages]
        self.seconds = [cost.seconds for cost in costs]
        self.workspace = [cost.workspace for cost in costs]
        self.parkable = parkable
        self.hidden = sum(cost.hidden for cost in costs)
        self.tile_rows = max((stage.rows for stage in program.stages if isinstance(stage, Tiled)), default=0)

    def _stage(self, stage: Any, widths: Mapping[str, float], shape: Shape) -> StageCost:
        if isinstance(stage, Tiled):
            tiles = -(-shape.tokens // stage.rows)
            inside = {**widths, INPUT: widths[INPUT], OUTPUT: widths[INPUT]}
            tile = Estimate(stage.program, inside, Shape(min(stage.rows, shape.tokens), shape.length, shape.autocast))
            once = tiles * sum(tile.seconds)
            workspace = max(tile.backward_bytes(frozenset()), tile.forward_bytes())
            return StageCost(once * (1 + TILE_SHARE), workspace, once * (1 + 3 * TILE_SHARE))
        traffic = sum(self.size.get(name, 0) for name in (*stage.reads, *stage.writes)) * (not stage.views)
        traffic += stage.traffic()
        seconds = stage.flops(shape.tokens, shape.length, widths) / FLOPS + traffic / BYTES
        return StageCost(seconds, stage.workspace(shape.tokens, widths, shape.autocast), 0.0)

    def fastest(self) -> Level:
        """Everything of use is kept."""
        return self.level(self.program.savable, frozenset())

    def levels(self) -> tuple[Level, ...]:
        """From keeping everything of use to keeping nothing, each step giving up what is cheapest to have again."""
        kept, chain = self.program.savable, []
        while True:
            chain.append(kept)
            if not kept:
                break
            kept = min((kept - {name} for name in sorted(kept)), key=lambda fewer: self._price(kept, fewer))
        ways = [self.level(kept, away) for kept in chain for away in self._places(kept)]
        return tuple(_worthwhile(ways))

    def _price(self, kept: frozenset[str], fewer: frozenset[str]) -> tuple[float, str]:
        """Seconds a byte saved; what saves nothing goes last."""
        (name,) = kept - fewer
        saved = self.held(kept) - self.held(fewer)
        return ((self._again(fewer) - self._again(kept)) / saved if saved else float("inf")), name

    def _again(self, kept: frozenset[str]) -> float:
        """Seconds of the forward stages that backward runs again."""
        return self.hidden + sum(
            self.seconds[s.stage] for s in self.program.schedule(kept).backward if not s.is_backward
        )

    def _places(self, kept: frozenset[str]) -> list[frozenset[str]]:
        """What may wait in host memory: nothing, the input, or with it all kept values that are worth a copy."""
        worth = frozenset(name for name in kept & self.parkable if self.size[name] >= MIN_BYTES)
        return list(dict.fromkeys([frozenset(), frozenset({INPUT}), worth | {INPUT}]))

    def level(self, kept: frozenset[str], away: frozenset[str]) -> Level:
        """What it costs to keep ``kept``, of which and of the input ``away`` waits in host memory."""
        seconds, moved = self._again(kept), sum(self.size[name] for name in away)
        if away:
            once = sum(self.seconds)
            seconds += OFFLOAD_SHARE * once + max(0.0, moved / LINK_BYTES - once)
        return Level(
            name=self._name(kept, away),
            kept=kept,
            offloaded=away,
            device_bytes=self.held(kept - away) + (0 if INPUT in away else self.size[INPUT]) - self.still_free,
            host_bytes=moved,
            seconds=seconds,
            # Its own input is back, and what comes next is on its way.
            working_bytes=self.backward_bytes(kept, away)
            + (self.size[INPUT] if INPUT in away else 0)
            + sum(sorted(self.size[name] for name in away)[-AHEAD:])
            + self.gradient_bytes,
            tile_rows=self.tile_rows,
        )

    def _name(self, kept: frozenset[str], away: frozenset[str]) -> str:
        missing = sorted(name for name in self.program.savable - kept if "." not in name)
        held = sorted(name for name in kept if "." not in name)
        if not missing:
            name = "keep"
        elif not held:
            name = "offload" if away else "recompute"
        elif len(held) <= len(missing):
            name = f"keep {', '.join(held)}"
        else:
            name = f"keep all but {', '.join(missing)}"
        name = f"{name}, MLP in tiles of {self.tile_rows:,}" if self.tile_rows else name
        if not away or not held:
            return name
        return f"{name}, offload all" if away - {INPUT} else f"{name}, offload"

    def held(self, names: Iterable[str]) -> int:
        """Bytes of the memory that some values hold; views hold all of what they are views of."""
        return sum(self.size.get(root, 0) for root in {self.root.get(name, name) for name in names})

    def forward_bytes(self) -> int:
        """Largest number of bytes in use while the layer runs forward and keeps nothing, its input apart."""
        present: set[str] = set()
        most = 0
        for step in self.program.schedule(frozenset()).forward:
            present |= set(self.program.forms[step.stage].writes)
            most = max(most, self.held(present) + self.workspace[step.stage])
            present -= set(step.frees)
        return most

    def backward_bytes(self, kept: frozenset[str], away: frozenset[str] = frozenset()) -> int:
        """Largest number of bytes in use while the layer runs backward, beyond its input and what was kept here.

        What is ``away`` is there from when it is first looked at.
        """
        present, before = set(kept - away), self.held(kept - away)
        grads, most = {OUTPUT: self.size[INPUT]}, 0
        for step in self.program.schedule(kept).backward:
            form = self.program.forms[step.stage]
            present |= kept & away & set(form.needs if step.is_backward else form.reads)
            working = sum(grads.values()) + self.workspace[step.stage]
            if step.is_backward:
                new = {name: self.size[name] for name in form.reads if name in self.size}
                overwritten = set(self.program.stages[step.stage].overwrites) & set(step.frees)  # type: ignore[attr-defined]
                working += sum(size for name, size in new.items() if name not in overwritten)
                grads = {name: size for name, size in grads.items() if name not in form.writes} | new
            else:
                present |= set(form.writes)
            most = max(most, self.held(present) + working - before)
            present -= set(step.frees)
        return most


def levels_of(estimates: Sequence[Estimate]) -> tuple[Level, ...]:
    """The levels of one layer's programs together, those that are worth having."""
    return tuple(_worthwhile([level for estimate in estimates for level in estimate.levels()]))


def _worthwhile(levels: Sequence[Level]) -> list[Level]:
    """Fastest first, each smaller in one way than every faster one: between the passes, or while it runs backward."""
    best: list[Level] = []
    for level in sorted(levels, key=lambda level: (level.seconds, level.device_bytes, level.working_bytes)):
        if all(level.device_bytes < b.device_bytes or _at_work(level) < _at_work(b) for b in best):
            best.append(level)
    return best


def _at_work(level: Level) -> int:
    return level.device_bytes + level.working_bytes
