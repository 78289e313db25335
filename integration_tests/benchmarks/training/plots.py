"""The pictures: step time and memory by contender, and how both grow with length and with batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.results import Figures
from integration_tests.benchmarks.training.workloads import GROUPS, WORKLOADS

WIDTH = 0.8
SHOWN = [name for name, contender in CONTENDERS.items() if not contender.truth]
Pick = Callable[[Figures], float | None]


def draw_all(folder: Path, figures: dict[Any, Figures]) -> list[Path]:
    """Every picture that has something to show; their paths."""
    good = [f for f in figures.values() if f.status == "ok" and f.contender in SHOWN]
    trainers = [f for f in good if WORKLOADS[f.workload].loop == "trainer"]
    lengths = [f for f in good if f.workload in GROUPS["length"]]
    batches = {name: [f for f in good if f.workload == name] for name in GROUPS["batch"]}
    pictures = []
    if trainers:
        pictures.append(draw_bars(folder / "training.png", trainers))
    if lengths:
        pictures.append(draw_growth(folder / "training-length.png", lengths, 1, "tokens in one row"))
    for name, rows in batches.items():
        if rows:
            axis = f"rows of {rows[0].point[1]:,} tokens"
            pictures.append(draw_growth(folder / f"training-{name}.png", rows, 0, axis))
    return pictures


def draw_bars(target: Path, rows: list[Figures]) -> Path:
    """Seconds a step and peak GiB, one group a workload, one bar a contender."""
    names = [name for name in WORKLOADS if any(f.workload == name for f in rows)]
    figure, axes = plt.subplots(2, 1, figsize=(max(9, 2.4 * len(names)), 7.5))
    for axis, pick, label in zip(
        axes,
        (lambda f: f.step_seconds, lambda f: f.peak_gib),
        ("seconds a step (lower is better)", "peak GiB (ours: what is spare buys speed)"),
        strict=True,
    ):
        for at, name in enumerate(names):
            _group(axis, at, [f for f in rows if f.workload == name], pick)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    return _finish(figure, target, {f.contender for f in rows})


def _group(axis: Any, at: int, rows: list[Figures], pick: Pick) -> None:
    """The bars of one workload, each with its value."""
    by_name = {f.contender: pick(f) or 0.0 for f in rows}
    here = [name for name in SHOWN if name in by_name]
    width = WIDTH / max(1, len(here))
    for i, name in enumerate(here):
        x = at + (i - (len(here) - 1) / 2) * width
        axis.bar(x, by_name[name], width * 0.92, color=CONTENDERS[name].colour)
        axis.annotate(f"{by_name[name]:.3g}", (x, by_name[name]), ha="center", va="bottom", fontsize=7)


def draw_growth(target: Path, rows: list[Figures], coordinate: int, label: str) -> Path:
    """Tokens a second from 0 on, peak GiB in doublings, over one coordinate of the points (0: batch, 1: length)."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, pick, what in zip(
        axes, (lambda f: f.tokens_per_second, lambda f: f.peak_gib), ("tokens a second", "peak GiB"), strict=True
    ):
        for name in SHOWN:
            points = sorted((f.point[coordinate], pick(f)) for f in rows if f.contender == name and pick(f))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=CONTENDERS[name].colour)
        axis.set_xscale("log", base=2)
        if what == "peak GiB":
            axis.set_yscale("log", base=2)
        else:
            axis.set_ylim(bottom=0)
        ticks = sorted({f.point[coordinate] for f in rows})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, minor=False)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.tick_params(which="both", labelsize=8)
        axis.set_xlabel(label)
        axis.set_ylabel(what)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _finish(figure, target, {f.contender for f in rows})


def _finish(figure: Any, target: Path, names: Iterable[str]) -> Path:
    """Add the legend and write the file."""
    here = [name for name in SHOWN if name in set(names)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=CONTENDERS[name].colour) for name in here]
    titles = [CONTENDERS[name].title for name in here]
    figure.legend(handles, titles, loc="lower center", ncols=min(5, len(here)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
