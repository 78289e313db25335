"""Losses against stock's, and figures against the bars. Pure functions of the file of results.

A contender whose losses differ computes something else: its time means nothing. The rule, for each step i:

    |loss_i - stock_i| <= FLOOR + max over steps j <= i of |other_j - stock_j|

where ``other`` are stock's own further rounds and stock in float32, for as many steps as it ran. So the distance that
rounding makes between bf16 and float32, which later steps inherit, is the measure; FLOOR is what one rounding of the
log and a differently rounded head may add. Where stock ran out of memory, the next of REFERENCES that has losses takes
its place.

usage: python -m integration_tests.benchmarks.training.judge DIR
Exits with 1 when a run of ours differs from its reference or failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from integration_tests.benchmarks.training import results
from integration_tests.benchmarks.training.bars import BARS, Bar
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.results import Result, Suite
from integration_tests.benchmarks.training.workloads import Point

FLOOR = 3e-3
"""Nats. A loss of 11.8 is 65,536 tokens' mean; bf16 logits move one token's by about 4e-3, the mean by far less."""
REFERENCES = ("stock", "liger", "unsloth", "axolotl")
TRUTHS = tuple(name for name, contender in CONTENDERS.items() if contender.truth)

Verdict = Literal["equal", "differs", "unjudged", "oom", "timeout", "error"]


@dataclass(frozen=True)
class LossVerdict:
    """One run's losses: ``worst`` is the largest distance to ``reference``'s, ``bound`` what it may be at that step."""

    workload: str
    contender: str
    round: int
    point: Point
    verdict: Verdict
    reference: str = ""
    worst: float | None = None
    bound: float | None = None
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether the benchmark fails for it: ours, and wrong or broken. Others' are only marked."""
        return CONTENDERS[self.contender].ours and self.verdict in ("differs", "error")


@dataclass(frozen=True)
class BarVerdict:
    """A bar, our figure, and the most it may be; ``holds`` is None where something was not measured."""

    bar: Bar
    value: float | None
    limit: float | None
    holds: bool | None


def judge_losses(suite: Suite) -> list[LossVerdict]:
    """A verdict on every run."""
    return [_judge(result, suite["results"]) for result in suite["results"]]


def _judge(result: Result, everything: list[Result]) -> LossVerdict:
    workload, contender, round_, point = results.key(result)
    name = (workload, contender, round_, point)
    if result["status"] != "ok":
        return LossVerdict(*name, result["status"], reason=result.get("error", ""))
    beside = [r for r in everything if r["workload"] == workload and results.key(r)[3] == point and r["status"] == "ok"]
    reference = _reference(beside)
    if reference is None:
        return LossVerdict(*name, "unjudged", reason=f"none of {', '.join(REFERENCES)} has losses here")
    expected = min(len(reference["losses"]), CONTENDERS[contender].steps or len(reference["losses"]))
    if len(result["losses"]) != expected or not expected:
        reason = f"{len(result['losses'])} losses, expected {expected}"
        return LossVerdict(*name, "differs", reference["contender"], reason=reason)
    bounds = loss_bounds(reference, _others(reference, beside))[:expected]
    distances = [abs(a - b) for a, b in zip(result["losses"], reference["losses"], strict=False)]
    # The step with the least room; a NaN has none.
    at = max(range(len(bounds)), key=lambda i: distances[i] - bounds[i] if distances[i] == distances[i] else 1e9)
    verdict: Verdict = "equal" if distances[at] <= bounds[at] else "differs"
    return LossVerdict(*name, verdict, reference["contender"], distances[at], bounds[at])


def _reference(beside: list[Result]) -> Result | None:
    for name in REFERENCES:
        found = [result for result in beside if result["contender"] == name]
        if found:
            return min(found, key=lambda result: result["round"])
    return None


def _others(reference: Result, beside: list[Result]) -> list[Result]:
    """What measures the reference's own rounding: stock's further rounds and the truth."""
    if reference["contender"] != REFERENCES[0]:
        return []
    same = (reference["contender"], *TRUTHS)
    return [result for result in beside if result is not reference and result["contender"] in same]


def loss_bounds(reference: Result, others: list[Result]) -> list[float]:
    """How far from the reference's loss another may be, step by step."""
    noise = [
        max((abs(other["losses"][i] - loss) for other in others if i < len(other["losses"])), default=0.0)
        for i, loss in enumerate(reference["losses"])
    ]
    return [FLOOR + largest for largest in itertools.accumulate(noise, max)]


def judge_bars(suite: Suite) -> list[BarVerdict]:
    """Which bars hold."""
    figures = results.figures(suite)
    return [_judge_bar(bar, figures) for bar in BARS]


def _judge_bar(bar: Bar, figures: dict[tuple[str, str, Point], results.Figures]) -> BarVerdict:
    ours = figures.get((bar.workload, bar.contender, bar.point))
    theirs = figures.get((bar.workload, bar.versus, bar.point)) if bar.versus else None
    if ours is None or ours.status in ("error", "timeout"):
        return BarVerdict(bar, None, None, None)
    limit = bar.limit
    if bar.versus:
        if theirs is None or theirs.status in ("error", "timeout"):
            return BarVerdict(bar, getattr(ours, bar.figure), None, None)
        # A contender that ran out of memory is beaten by whoever did not.
        limit = bar.limit * (getattr(theirs, bar.figure) if theirs.status == "ok" else float("inf"))
    value = getattr(ours, bar.figure)
    return BarVerdict(bar, value, limit, value is not None and value <= limit)


def passes(suite: Suite) -> bool:
    """Whether every run of ours computed what stock computes."""
    return not any(verdict.fails for verdict in judge_losses(suite))


def lines(suite: Suite) -> list[str]:
    """What is wrong and which bars hold, for a terminal."""
    bad = [verdict for verdict in judge_losses(suite) if verdict.verdict not in ("equal", "oom")]
    said = [
        f"{'FAIL' if v.fails else 'note'}: {v.workload} {v.contender} {v.point[0]}x{v.point[1]} round {v.round}: "
        f"{v.verdict} {_distance(v)}{v.reason}"
        for v in bad
    ]
    words = {True: "holds", False: "MISSED", None: "not measured"}
    return said + [
        f"{words[v.holds]}: {v.bar.workload} {v.bar.contender}: {v.bar.describe()}{_figure(v)}"
        for v in judge_bars(suite)
    ]


def _distance(verdict: LossVerdict) -> str:
    if verdict.worst is None:
        return ""
    return f"by {verdict.worst:.2g} from {verdict.reference}, {verdict.bound:.2g} allowed "


def _figure(verdict: BarVerdict) -> str:
    return (
        ""
        if verdict.value is None
        else f" (measured {verdict.value:.4g}"
        + (f", at most {verdict.limit:.4g})" if verdict.limit is not None else ")")
    )


def main() -> int:
    """Judge a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    suite = results.load(parser.parse_args().folder)
    print("\n".join(lines(suite)))
    return int(not passes(suite))


if __name__ == "__main__":
    sys.exit(main())
