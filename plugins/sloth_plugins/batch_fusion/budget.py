"""How many passes a step takes: as few as pay, from what the memory plan says of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from sloth_backend import ranks
from sloth_plugins.batch_fusion.rows import Rows

_UNFIT = 1e30
"""Seconds of passes that do not fit: more than any that do."""


class Planner(Protocol):
    """What knows the cost of a pass: ``layer_programs`` puts one on the model."""

    saves_memory: bool
    """Whether memory counts more than time."""
    least_seconds: float
    """No pass takes less."""
    transient: bool
    """Whether nobody keeps a tensor of a pass when the next one begins; to be set by who runs them."""

    def pass_seconds(self, tokens: int, longest: int, autocast: torch.dtype | None, alone: bool) -> float | None:
        """Seconds that such a pass takes, ``alone`` in its step or one of several; None where it does not fit."""
        ...


class Budget:
    """Chooses among ways to divide a step.

    Args:
        planner: of the model; None where nobody knows what a pass costs.
        autocast: what the passes compute in.
    """

    def __init__(self, planner: Planner | None, autocast: torch.dtype | None) -> None:
        self.planner, self.autocast = planner, autocast

    @contextmanager
    def transient(self) -> Iterator[None]:
        """Nobody keeps a tensor of the passes that run meanwhile."""
        if self.planner is None:
            yield
            return
        self.planner.transient = True
        try:
            yield
        finally:
            self.planner.transient = False

    def best(self, ways: Sequence[list[Rows]], largest: int) -> list[Rows]:
        """The cheapest way that fits, of equal ones the one with the fewest passes.

        Where memory counts most, or nobody knows the cost, no pass is larger than the ``largest`` that the host makes,
        padding included. Where nothing fits it is the way of the smallest passes.
        """
        if self.planner is None or self.planner.saves_memory:
            return next((way for way in ways if max(rows.tokens for rows in way) <= largest), ways[-1])
        best, least = ways[-1], math.inf
        for way in sorted(ways, key=len):
            if len(way) * self.planner.least_seconds >= least:
                break  # it cannot be cheaper, and need not be planned
            if (cost := self._cost(way)) < least:
                best, least = way, cost
        return best

    def best_together(
        self, ways: Mapping[int, list[Rows]], parts: list[Rows], count: int, most: int, largest: int
    ) -> list[Rows] | None:
        """The way whose number of passes is the cheapest for all processes of a run; None to pass as the host does.

        Args:
            ways: by their number of passes, fewer than there are micro-batches.
            parts: a pass for each micro-batch; empty where they can only pass as they are.
            count: of the micro-batches: as many passes are possible everywhere, in one of these two ways.
            most: micro-batches that a step may have in any process.
            largest: as in ``best``.
        """
        costs = [math.inf] * most
        for number, cost in self._costs({**ways, count: parts} if parts else {}, largest):
            costs[number - 1] = cost
        costs[count - 1] = min(costs[count - 1], _UNFIT if parts else 0.0)
        # The slowest holds all others up.
        together = ranks.largest(costs)
        number = together.index(min(together)) + 1
        return (parts or None) if number >= count else ways[number]

    def _costs(self, ways: Mapping[int, list[Rows]], largest: int) -> Iterator[tuple[int, float]]:
        """What each way costs, or no more than it, where it cannot be the cheapest."""
        least = math.inf
        for number, way in sorted(ways.items()):
            if self.planner is None or self.planner.saves_memory:
                cost = float(number) if max(rows.tokens for rows in way) <= largest else math.inf
            elif number * self.planner.least_seconds >= least:
                cost = number * self.planner.least_seconds
            else:
                cost = self._cost(way)
            least = min(least, cost)
            yield number, cost

    def _cost(self, way: Sequence[Rows]) -> float:
        assert self.planner is not None
        alone = len(way) == 1
        seconds = [self.planner.pass_seconds(rows.tokens, max(rows.lengths), self.autocast, alone) for rows in way]
        return math.inf if None in seconds else sum(s for s in seconds if s is not None)


def autocast_of(trainer: Any) -> torch.dtype | None:
    """What the trainer's model will be run under, as accelerate has it; FSDP2 casts parameters and inputs instead."""
    if getattr(trainer.accelerator, "is_fsdp2", False):
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(trainer.accelerator.mixed_precision))
