"""Draw what the benchmarks wrote: DIR/ops.json -> DIR/ops.png.

usage: python integration_tests/benchmarks/plot.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"sloth": "#2f7d4f", "liger": "#d08c2e", "reference": "#9aa0a6"}
NAMES = {"sloth": "sloth_backend", "liger": "Liger", "reference": "plain PyTorch"}
BAR = 0.8
"""The bar of the memory-bound ops: this share of a device copy's bandwidth."""


def first_case_each(rows: list[dict[str, Any]], figure: str) -> dict[tuple[str, str], dict[str, float]]:
    """(op, direction) -> implementation -> figure, for the first timed call of each op."""
    cases: dict[str, str] = {}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row[figure] is not None and cases.setdefault(row["op"], row["case"]) == row["case"]:
            found.setdefault((row["op"], row["direction"]), {})[row["implementation"]] = row[figure]
    return found


def bars(axes: Any, figures: dict[tuple[str, str], dict[str, float]], form: str) -> None:
    """One group of bars an (op, direction), one bar an implementation, each with its value."""
    width = 0.26
    for i, (_, values) in enumerate(figures.items()):
        for j, name in enumerate(name for name in COLOURS if name in values):
            at = i + (j - (len(values) - 1) / 2) * width
            axes.bar(at, values[name], width * 0.92, color=COLOURS[name])
            axes.annotate(form.format(values[name]), (at, values[name]), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(figures)), [f"{op}\n{direction}" for op, direction in figures], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: dict[str, Any], target: Path) -> None:
    """Memory-bound ops as a share of the copy bandwidth, product-bound ones in milliseconds."""
    rows, about = report["rows"], report["machine"]
    for row in rows:
        row["milliseconds"] = row["microseconds"] / 1e3 if row["teraflops"] else None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3.4, 1))
    bars(left, first_case_each(rows, "share_of_copy"), "{:.0%}")
    left.axhline(BAR, color="#555", linewidth=0.8, linestyle="--")
    left.set_ylabel("share of a device copy's bandwidth")
    left.set_title("Memory-bound ops, 16,384 tokens, bf16 (higher is better)", fontsize=10)
    bars(right, first_case_each(rows, "milliseconds"), "{:.1f}")
    right.set_ylabel("milliseconds")
    right.set_title("Head and loss (lower is better)", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, NAMES.values(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    versions = ", ".join(f"{key} {about[key]}" for key in ("torch", "triton", "liger-kernel"))
    figure.suptitle(f"Speed of each op on one {about['gpu']} ({versions})", fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(target, dpi=130)


def main() -> None:
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "ops.json").read_text()), folder / "ops.png")


if __name__ == "__main__":
    main()
