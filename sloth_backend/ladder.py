"""The plans worth having for a pass, from the least peak to the fastest.

It is a knapsack with two peculiarities. What a layer holds counts at the end of forward and in the backward of the
layers from it on, not below it; so layers that are alike take their faster levels from the last one on. And more budget
must never give a slower plan; so the ladder does not depend on the budget, which only says how far up to go.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from sloth_backend.costs import Cached, Costs, Level


@dataclass(frozen=True)
class Rung:
    """One level a layer, their ``seconds`` in sum, and their ``peak`` without fixed bytes and dense weights."""

    levels: tuple[Level, ...]
    seconds: float
    peak: int


class Ladder:
    """Rungs of rising peak and falling time, each the one below with one layer at a faster level.

    The lowest has the least peak there is (host memory being limited: that was found) and whatever speed is free at
    that peak. The steps up follow by the time they save a byte, as in the greedy solution of a knapsack.

    Args:
        costs: of the pass.
        host_budget_bytes: bytes of pinned host memory that may be held; None for no limit.
    """

    def __init__(self, costs: Costs, host_budget_bytes: int | None = None) -> None:
        self.costs = costs
        self.host_budget = math.inf if host_budget_bytes is None else host_budget_bytes
        self.options = _shared(costs.layers)
        steps = _steps(self.options)
        least = self._least()
        *_, free = self._climb(least, steps, limit=least.peak)
        self.rungs = _frontier(self._climb(free, steps))
        cached = costs.cached or Cached((), ())
        self.cache_bytes = tuple(accumulate(cached.bytes_per_layer, initial=0))
        self.cache_seconds = tuple(accumulate(cached.seconds_per_layer, initial=0.0))

    def under(self, budget_bytes: int) -> tuple[Rung, int]:
        """The fastest rung under a budget and how many layers hold dense weights; the lowest and 0 where none fits."""
        peaks = [rung.peak for rung in self.rungs]
        best = (math.inf, 0, 0)
        for count, size in enumerate(self.cache_bytes):
            at = bisect.bisect_right(peaks, budget_bytes - self.costs.fixed_bytes - size) - 1
            if at >= 0:
                best = min(best, (self.rungs[at].seconds - self.cache_seconds[count], at, count))
        return self.rungs[best[1]], best[2]

    def _rung(self, levels: Sequence[Level]) -> Rung:
        return Rung(tuple(levels), sum(level.seconds for level in levels), self.costs.layers_peak(levels))

    def _least(self) -> Rung:
        """The rung of least peak, by bisection over what the peak may be."""
        by_size = {id(levels): sorted(levels, key=_size) for levels in self.options}
        layers = [by_size[id(levels)] for levels in self.options]
        best = self._rung([next(level for level in levels if level.host_bytes == 0) for levels in layers])
        low, high = 0, best.peak
        while low < high:
            middle = (low + high) // 2
            found = self._fit(layers, middle)
            if found is None:
                low = middle + 1
            else:
                best, high = self._rung(found), min(middle, self.costs.layers_peak(found))
        return best

    def _fit(self, layers: Iterable[Sequence[Level]], limit: int) -> list[Level] | None:
        """Levels whose peak is at most ``limit``: each layer's smallest that is, since a byte held counts later on.

        Without a limit to host memory none exist if none is found.
        """
        held, host, chosen = 0, self.host_budget, []
        for options in layers:
            room = limit - held
            for level in options:
                if level.device_bytes + level.working_bytes <= room and level.host_bytes <= host:
                    break
            else:
                return None
            held += level.device_bytes
            host -= level.host_bytes
            chosen.append(level)
        return chosen if held + self.costs.end_bytes <= limit else None

    def _climb(self, start: Rung, steps: Iterable[Step], limit: float = math.inf) -> list[Rung]:
        """``start`` and the rungs that lead up from it, while the peak stays within ``limit``."""
        rungs = [start]
        for step in steps:
            rungs += self._take(step, rungs[-1], limit)
        return rungs

    def _take(self, step: Step, start: Rung, limit: float) -> list[Rung]:
        """One rung for each layer that ``step`` makes faster, from the last layer to the first.

        A layer's change leaves the moments below it as they are, and shifts those above it by the bytes it adds.
        """
        levels, seconds, target = list(start.levels), start.seconds, step.target
        host = self.host_budget - sum(level.host_bytes for level in levels)
        held = list(accumulate(level.device_bytes for level in levels))
        lower = list(accumulate((h + lv.working_bytes for h, lv in zip(held, levels, strict=True)), max, initial=0))
        upper, rungs = (held[-1] if held else 0) + self.costs.end_bytes, []
        for i in reversed(range(len(levels))):
            if upper >= limit:
                break
            level = levels[i]
            more, more_host = target.device_bytes - level.device_bytes, target.host_bytes - level.host_bytes
            if self.options[i] is step.options and target.seconds < level.seconds and more_host <= host:
                raised = max(upper + more, held[i] + more + target.working_bytes)
                peak = max(raised, lower[i])
                if peak <= limit:
                    levels[i], upper, host = target, raised, host - more_host
                    seconds += target.seconds - level.seconds
                    rungs.append(Rung(tuple(levels), seconds, peak))
                    continue
            upper = max(upper, held[i] + level.working_bytes)
        return rungs


@dataclass(frozen=True)
class Step:
    """Bring the layers with these ``options`` to ``target``: ``rate`` seconds saved a byte held."""

    options: tuple[Level, ...]
    target: Level
    rate: float


def _shared(layers: Sequence[tuple[Level, ...]]) -> list[tuple[Level, ...]]:
    """The same layers, with one tuple for all that are equal."""
    first: dict[tuple[Level, ...], tuple[Level, ...]] = {}
    known: dict[int, tuple[Level, ...]] = {}
    for levels in layers:
        if id(levels) not in known:
            known[id(levels)] = first.setdefault(levels, levels)
    return [known[id(levels)] for levels in layers]


def _steps(layers: Iterable[tuple[Level, ...]]) -> list[Step]:
    """The steps of all kinds of layers, those that save the most first."""
    kinds = {id(levels): levels for levels in layers}.values()
    return sorted((step for levels in kinds for step in _hull(levels)), key=lambda step: -step.rate)


def _hull(levels: tuple[Level, ...]) -> list[Step]:
    """Steps along the lower convex hull of seconds over device bytes: any other level is worse than a mix of two."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda level: (level.device_bytes, level.seconds, level.working_bytes)):
        if hull and level.seconds >= hull[-1].seconds:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], level):
            hull.pop()
        hull.append(level)
    # The first costs no bytes between the passes, yet levels as small may be slower: those of less working memory.
    return [Step(levels, hull[0], math.inf), *(Step(levels, b, _rate(a, b)) for a, b in pairwise(hull))]


def _rate(slow: Level, fast: Level) -> float:
    return (slow.seconds - fast.seconds) / (fast.device_bytes - slow.device_bytes)


def _size(level: Level) -> tuple[int, int, float]:
    return level.device_bytes, level.working_bytes, level.seconds


def _frontier(rungs: Iterable[Rung]) -> list[Rung]:
    """The rungs that no other beats in both peak and time, by rising peak."""
    best: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.peak, rung.seconds)):
        if not best or rung.seconds < best[-1].seconds:
            best.append(rung)
    return best
