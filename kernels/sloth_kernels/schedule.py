"""When the stages of a program run, and how long each value lives, for a set of values that are kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

INPUT, OUTPUT = "x", "y"
"""A program's input and its result."""


class Form(NamedTuple):
    """What a schedule follows from."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    needs: tuple[str, ...]


class Step(NamedTuple):
    """Run stage ``stage`` forward, or backward, then let go of the values ``frees``."""

    stage: int
    is_backward: bool
    frees: tuple[str, ...]


class Schedule(NamedTuple):
    """The steps of both passes for one set of kept values."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]


@functools.lru_cache(maxsize=1024)
def schedule(forms: tuple[Form, ...], constants: frozenset[str], kept: frozenset[str]) -> Schedule:
    """The steps for ``kept``; ``x`` and the constants are always there."""
    given = constants | {INPUT}
    return Schedule(_forward_steps(forms, given | kept | {OUTPUT}), _backward_steps(forms, given, given | kept))


def _forward_steps(forms: tuple[Form, ...], stays: frozenset[str]) -> tuple[Step, ...]:
    steps = []
    for i, form in enumerate(forms):
        later = {name for other in forms[i + 1 :] for name in other.reads}
        frees = {*form.reads, *form.writes} - later - stays
        steps.append(Step(i, False, tuple(sorted(frees))))
    return tuple(steps)


def _backward_steps(forms: tuple[Form, ...], given: frozenset[str], at_hand: frozenset[str]) -> tuple[Step, ...]:
    made_by = {name: i for i, form in enumerate(forms) for name in form.writes}
    present, steps = set(at_hand), []

    def bring(names: Iterable[str]) -> None:
        for name in names:
            if name not in present:
                stage = made_by[name]
                bring(forms[stage].reads)
                present.update(forms[stage].writes)
                steps.append((stage, False, set(present)))

    for i in reversed(range(len(forms))):
        bring(forms[i].needs)
        present &= _wanted(forms, i, present, made_by) | given
        steps.append((i, True, set(present)))
    return _with_frees(steps, forms, at_hand)


def _wanted(forms: tuple[Form, ...], before: int, present: set[str], made_by: Mapping[str, int]) -> set[str]:
    """Of what is present, what the backward of the stages ``before`` one needs, be it to compute what is missing."""
    wanted: set[str] = set()
    stack = [name for form in forms[:before] for name in form.needs]
    while stack:
        name = stack.pop()
        if name in wanted:
            continue
        wanted.add(name)
        if name not in present and name in made_by:
            stack.extend(forms[made_by[name]].reads)
    return wanted & present


def _with_frees(
    steps: list[tuple[int, bool, set[str]]], forms: tuple[Form, ...], at_hand: frozenset[str]
) -> tuple[Step, ...]:
    """Name what each step lets go of: what is not present after it but was before, or was written for nothing."""
    result, before = [], set(at_hand)
    for stage, is_backward, after in steps:
        had = before | (set() if is_backward else set(forms[stage].writes))
        result.append(Step(stage, is_backward, tuple(sorted(had - after))))
        before = after
    return tuple(result)
