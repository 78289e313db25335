"""The loss curves of one or two runs as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sloth_backend.demo.outcome import Curve, Outcome

SMOOTHING = 0.9
COLORS = ("#1b6ca8", "#e07a1f")


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Write a PNG: each step's training loss (pale), its running mean, and the held-out loss as points.

    With two runs the second is drawn dashed over the first, and a panel below shows the distance between their
    training losses step by step.
    """
    figure = Figure(figsize=(9, 5.4 if len(outcomes) == 1 else 7), dpi=150, layout="constrained")
    if len(outcomes) == 1:
        upper = figure.subplots()
    else:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _differences(lower, *outcomes)
    for outcome, color, style in zip(outcomes, COLORS, ("-", "--"), strict=False):
        _curves(upper, outcome, color, style)
    figure.axes[-1].set_xlabel("optimizer step")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(f"{outcomes[0].model}\n{outcomes[0].data}", fontsize=10, loc="left")
    upper.legend(frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def smooth(curve: Curve, weight: float = SMOOTHING) -> list[float]:
    """Exponential running mean of a curve's losses, corrected for its start as in Adam (Kingma and Ba, 2015)."""
    result, mean = [], 0.0
    for n, (_, loss) in enumerate(curve, 1):
        mean = weight * mean + (1 - weight) * loss
        result.append(mean / (1 - weight**n))
    return result


def _curves(axes: Axes, outcome: Outcome, color: str, style: str) -> None:
    name = outcome.settings.name
    steps = [step for step, _ in outcome.train]
    axes.plot(steps, [loss for _, loss in outcome.train], color=color, alpha=0.2, linewidth=0.8)
    axes.plot(steps, smooth(outcome.train), style, color=color, linewidth=2, label=f"{name}, training (running mean)")
    points = list(zip(*outcome.held_out, strict=True))
    axes.plot(*points, "o", color=color, markeredgecolor="white", markersize=8, label=f"{name}, held out")
    for step, loss in (outcome.held_out[0], outcome.held_out[-1]):
        axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(6, 8), fontsize=9, color=color)


def _differences(axes: Axes, one: Outcome, other: Outcome) -> None:
    distances = [abs(a - b) for (_, a), (_, b) in zip(one.train, other.train, strict=True)]
    axes.plot([step for step, _ in one.train], distances, color="#555555", linewidth=1)
    axes.set_ylabel("distance between\ntraining losses")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
