"""MemoryPlan: what each layer does with the values that its backward will need, and how it is chosen.

Pure functions over bytes and seconds: no torch, no device, the same answer on every rank that is given the same costs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from sloth_backend.costs import Cached, Costs, Level, peak_bytes
from sloth_backend.findings import Finding
from sloth_backend.ladder import Ladder

__all__ = [
    "CAPABILITY",
    "KEEP",
    "OFFLOAD",
    "RECOMPUTE",
    "Cached",
    "Costs",
    "Level",
    "MemoryPlan",
    "Mode",
    "choose",
    "describe",
    "measured",
    "peak_bytes",
    "planned",
]

CAPABILITY = "memory_plan"
Mode = Literal["auto", "least", "fastest"]

KEEP, RECOMPUTE, OFFLOAD = Level("keep"), Level("recompute"), Level("offload")
"""Levels of a layer that runs as the host's module: not checkpointed by us; checkpointed, its input on the device;
checkpointed, its input in pinned host memory."""

BACKOFF = 16
"""Each time memory runs out, the budget becomes one part in this many smaller than the predicted peak."""

ACCURACY = 0.05
"""A measured peak further from the predicted one than this share of it is a warning."""


@dataclass(frozen=True)
class MemoryPlan:
    """One level a layer, in the order in which the layers run forward.

    Attributes:
        levels: one a layer.
        cached_layers: how many layers, from the first on, hold dense copies of their weights.
        predicted_peak_bytes: the most that is allocated on the device at one time; 0 where nothing was predicted.
        budget_bytes: what the plan had to stay under; None where it had no limit.
        fits: whether it does.
        tokens: the pass it is made for; 0 where it does not depend on it.
    """

    levels: tuple[Level, ...]
    cached_layers: int = 0
    predicted_peak_bytes: int = 0
    budget_bytes: int | None = None
    fits: bool = True
    tokens: int = 0

    def __str__(self) -> str:
        """``22 recompute, 10 keep``: how many layers do what, in the order in which they first do."""
        counts = Counter(level.name for level in self.levels)
        return ", ".join(f"{count} {name}" for name, count in counts.items())

    def tighter(self, costs: Costs, host_budget_bytes: int | None = None) -> MemoryPlan | None:
        """The plan to try next when memory ran out under this one; None where this is the least already.

        Repeated, it ends at the least plan. Its ``budget_bytes`` is what passes of other lengths should be planned with
        from then on.

        Args:
            costs: those that this plan was chosen from.
            host_budget_bytes: as for ``choose``.
        """
        budget = self.predicted_peak_bytes - max(1, self.predicted_peak_bytes // BACKOFF)
        plan = choose(costs, budget, host_budget_bytes)
        return plan if plan.predicted_peak_bytes < self.predicted_peak_bytes else None


def choose(
    costs: Costs, budget_bytes: int | None, host_budget_bytes: int | None = None, mode: Mode = "auto"
) -> MemoryPlan:
    """The plan for a pass. More budget is never slower; equal arguments give equal plans.

    Args:
        costs: of the pass.
        budget_bytes: bytes that may be allocated on the device; None for no limit.
        host_budget_bytes: bytes of pinned host memory that may be held; None for no limit.
        mode: ``"auto"`` takes the fastest plan under the budget, the least where none is; ``"least"`` the one of
            least peak, of several the fastest; ``"fastest"`` the fastest. ``fits`` says whether it is under the budget.
    """
    ladder = Ladder(costs, host_budget_bytes)
    if mode == "least":
        rung, cached = ladder.rungs[0], 0
    elif mode == "fastest" or budget_bytes is None:
        rung, cached = ladder.rungs[-1], len(ladder.cache_bytes) - 1
    else:
        rung, cached = ladder.under(budget_bytes)
    peak = peak_bytes(rung.levels, cached, costs)
    fits = budget_bytes is None or peak <= budget_bytes
    return MemoryPlan(rung.levels, cached, peak, budget_bytes, fits, costs.tokens)


def describe(plan: MemoryPlan) -> str:
    """``layers: 22 recompute, 10 keep; dense weights of 32 layers cached; predicted peak 38.2 GiB of 120.3``."""
    parts = [f"layers: {plan}" if plan.levels else "no layers"]
    if plan.cached_layers:
        layers = "layer" if plan.cached_layers == 1 else "layers"
        parts.append(f"dense weights of {plan.cached_layers} {layers} cached")
    if host := sum(level.host_bytes for level in plan.levels):
        parts.append(f"{_gib(host)} GiB in host memory")
    if plan.predicted_peak_bytes:
        budget = f" of {_gib(plan.budget_bytes)}" if plan.budget_bytes is not None else ""
        tokens = f" at {plan.tokens:,} tokens a pass" if plan.tokens else ""
        parts.append(f"predicted peak {_gib(plan.predicted_peak_bytes)} GiB{budget}{tokens}")
    return "; ".join(parts)


def planned(plan: MemoryPlan) -> Finding:
    """The plan as a Finding: a warning where it does not fit."""
    if plan.fits:
        return Finding("changed", "memory", describe(plan), CAPABILITY)
    remedy = "shorter rows, a smaller batch or a larger budget would"
    return Finding("warned", "memory", f"{describe(plan)}; this does not fit, {remedy}", CAPABILITY)


def measured(plan: MemoryPlan, peak: int) -> Finding:
    """What the device measured, ``peak`` bytes allocated, beside what was predicted.

    A warning where it is over the budget, or further off than ``ACCURACY``.
    """
    predicted = plan.predicted_peak_bytes
    words = f"measured peak {_gib(peak)} GiB, predicted {_gib(predicted)}"
    if plan.budget_bytes is not None and peak > plan.budget_bytes:
        return Finding("warned", "memory", f"{words}, over the budget of {_gib(plan.budget_bytes)}", CAPABILITY)
    if abs(peak - predicted) > ACCURACY * predicted:
        return Finding("warned", "memory", f"{words}: off by more than {ACCURACY:.0%}", CAPABILITY)
    return Finding("changed", "memory", words, CAPABILITY)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"
