"""A memory plan that another plugin made, told in the values of programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from sloth_backend.plan import KEEP, OFFLOAD, RECOMPUTE, Level, MemoryPlan
from sloth_kernels.program import INPUT, Program
from sloth_plugins.layer_programs.assemble import LayerProgram

NAMES = (KEEP.name, RECOMPUTE.name, OFFLOAD.name)
"""Levels that need not name values."""


def for_programs(
    plan: MemoryPlan, layers: Mapping[str, nn.Module], made: Mapping[nn.Module, LayerProgram]
) -> MemoryPlan | str:
    """The part of ``plan`` that speaks of programs, each level's values named; or why it cannot be followed.

    Args:
        plan: one level for each of ``layers``.
        layers: dotted name -> layer, in the order in which they run.
        made: layer -> its program, for those that run as one, in the same order.
    """
    if len(plan.levels) != len(layers):
        return f"the memory plan has {len(plan.levels)} layers, the model {len(layers)}"
    levels = []
    for (name, layer), level in zip(layers.items(), plan.levels, strict=True):
        if layer in made:
            found = level_for(level, made[layer].program)
            if isinstance(found, str):
                return f"the memory plan's level {level.name!r} for {name} {found}"
            levels.append(found)
    cached = sum(layer in made for layer in [*layers.values()][: plan.cached_layers])
    return replace(plan, levels=tuple(levels), cached_layers=cached)


def level_for(level: Level, program: Program) -> Level | str:
    """``level`` with the values it means for ``program``, or what is wrong with it."""
    if not level.kept and not level.offloaded:
        if level.name not in NAMES:
            return f"names neither values to keep nor to offload, and is none of {', '.join(NAMES)}"
        kept = program.savable if level.name == KEEP.name else frozenset()
        return replace(level, kept=kept, offloaded=frozenset({INPUT}) if level.name == OFFLOAD.name else frozenset())
    if unknown := level.kept - program.savable:
        return f"keeps {_words(unknown)}; what can be kept is {_words(program.savable)}"
    if unknown := level.offloaded - level.kept - {INPUT}:
        return f"offloads {_words(unknown)}; what can be offloaded is {INPUT}, the layer's input, and what is kept"
    return level


def _words(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
