"""The file of results: one entry a point of a contender in a round, written after each, so that nothing is lost."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training.workloads import Point

FILE = "training.json"
FINISHED = ("ok", "oom")
"""A run that is either is not repeated; one that failed or took too long is, at the next call."""

Result = dict[str, Any]
Suite = dict[str, Any]
"""``results``: a list of Result; ``absent``: contender -> why it did not run."""


def load(folder: Path) -> Suite:
    """What the folder holds; an empty suite where there is none yet."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {"results": [], "absent": {}}


def save(folder: Path, suite: Suite) -> None:
    """Write the suite; a reader finds the old file or the new one, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    lines = ",\n".join(f"  {json.dumps(result)}" for result in suite["results"])
    partial.write_text(f'{{"absent": {json.dumps(suite["absent"])},\n "results": [\n{lines}\n]}}\n')
    os.replace(partial, folder / FILE)


def key(result: Result) -> tuple[str, str, int, Point]:
    """Workload, contender, round and point."""
    return result["workload"], result["contender"], result["round"], (result["batch"], result["length"])


def add(suite: Suite, result: Result) -> None:
    """Put a result in, in the place of an earlier one of the same key."""
    suite["results"] = [old for old in suite["results"] if key(old) != key(result)] + [result]


def missing(suite: Suite, workload: str, contender: str, round_: int, points: Iterable[Point]) -> list[Point]:
    """The points that have no finished result."""
    done = {key(result) for result in suite["results"] if result["status"] in FINISHED}
    return [point for point in points if (workload, contender, round_, point) not in done]


def latest_peak(suite: Suite, workload: str, contender: str, points: Iterable[Point]) -> float | None:
    """The peak GiB of the contender's latest result, the least of several points; None where one is not there yet."""
    peaks = {
        key(result)[3]: result["peak_gib"]
        for result in suite["results"]
        if key(result)[:2] == (workload, contender) and result["status"] == "ok"
    }
    found = [peaks.get(point) for point in points]
    return None if None in found else min(peak for peak in found if peak is not None)


@dataclass(frozen=True)
class Figures:
    """The rounds of one contender at one point, as one.

    Attributes:
        status: ``ok`` if any round was, else that of the last round.
        step_seconds: median of the rounds' medians; None unless ``ok``, as are the others.
        peak_gib: the largest of all rounds; so are ``reserved_gib`` and ``base_gib``.
    """

    workload: str
    contender: str
    point: Point
    status: str
    rounds: int
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    reserved_gib: float | None = None
    base_gib: float | None = None


def figures(suite: Suite) -> dict[tuple[str, str, Point], Figures]:
    """Every contender's figures at every point: (workload, contender, point) -> Figures."""
    groups: dict[tuple[str, str, Point], list[Result]] = {}
    for result in suite["results"]:
        workload, contender, _, point = key(result)
        groups.setdefault((workload, contender, point), []).append(result)
    return {name: _one(*name, results) for name, results in groups.items()}


def _one(workload: str, contender: str, point: Point, results: list[Result]) -> Figures:
    good = [result for result in results if result["status"] == "ok"]
    if not good:
        return Figures(workload, contender, point, results[-1]["status"], len(results))
    seconds = statistics.median(result["step_seconds"] for result in good)
    speed = statistics.median(result["tokens_per_second"] for result in good)
    largest = {name: max(result[name] for result in good) for name in ("peak_gib", "reserved_gib", "base_gib")}
    return Figures(workload, contender, point, "ok", len(good), seconds, speed, **largest)
