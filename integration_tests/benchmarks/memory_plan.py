"""Draw what a memory plan predicts: the device's memory over one step, layer by layer, for a range of budgets.

usage: python integration_tests/benchmarks/memory_plan.py OUT.png [--tokens 16384] [--budgets 12,24,48,120] [--host 64]

The costs are those of Llama-3.1-8B's shapes with a 4-bit base and LoRA of rank 32, estimated from shapes alone: what
``Costs`` holds in a run is estimated from the model itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from sloth_backend.plan import Cached, Costs, Level, MemoryPlan, choose, describe

GIB = 1 << 30
LAYERS, HIDDEN, FFN, KV, VOCABULARY = 32, 4096, 14336, 1024, 128256
FLOPS, BANDWIDTH, LINK = 7e14, 3.5e12, 5e10
"""What a product, a copy on the device and a copy to the host reach a second on an H200."""

GROUPS = (
    ("attention", 2 * (2 * HIDDEN + 2 * KV), 4 * HIDDEN * (HIDDEN + KV)),
    ("gate and up", 2 * 2 * FFN, 4 * HIDDEN * FFN),
    ("residual", 2 * HIDDEN, 2 * HIDDEN * HIDDEN),
    ("norms", 2 * 2 * HIDDEN, 0),
    ("activation", 2 * FFN, 0),
)
"""Values of a layer: bytes a token, FLOP a token that bring them back; those first that are dearest a byte."""


def levels(tokens: int) -> tuple[Level, ...]:
    """From keeping all values of a layer to keeping its input alone, and that in host memory."""
    x = 2 * HIDDEN * tokens
    every = sum(width for _, width, _ in GROUPS) * tokens
    found = []
    for n in range(len(GROUPS), -1, -1):
        kept, again = GROUPS[:n], GROUPS[n:]
        held, made = (sum(width for _, width, _ in part) * tokens for part in (kept, again))
        seconds = sum(flops for _, _, flops in again) * tokens / FLOPS + 2 * made / BANDWIDTH
        name = "keep" if not again else f"keep to {kept[-1][0]}" if kept else "recompute"
        found.append(Level(name, device_bytes=x + held, seconds=seconds, working_bytes=made + every // 2))
    last = found[-1]
    late = max(0.0, 2 * x / LINK - last.seconds)
    found.append(
        Level("offload", frozenset(), frozenset({"x"}), 0, x, last.seconds + late + 1e-5, last.working_bytes + 2 * x)
    )
    return tuple(found)


def costs(tokens: int) -> Costs:
    """Costs of a pass of ``tokens``."""
    dense = 2 * (2 * HIDDEN * (HIDDEN + KV) + 3 * HIDDEN * FFN)
    fixed = LAYERS * dense // 4 + 2 * 2 * VOCABULARY * HIDDEN + 10 * 84_000_000
    head = 2 * min(tokens, 1024) * 2 * VOCABULARY + 3 * 2 * HIDDEN * tokens
    forward = 3 * 2 * FFN * tokens
    cached = Cached((dense,) * LAYERS, (2.5 * dense / BANDWIDTH,) * LAYERS)
    return Costs(tokens, (levels(tokens),) * LAYERS, fixed, head, forward, cached)


def moments(plan: MemoryPlan, cost: Costs) -> list[tuple[int, int]]:
    """Bytes that all layers hold and transient bytes, at each moment: forward, head, backward."""
    held, result = 0, []
    for level in plan.levels:
        held += level.device_bytes
        result.append((held, cost.forward_bytes))
    result.append((held, cost.end_bytes))
    for level in reversed(plan.levels):
        result.append((held, level.working_bytes))
        held -= level.device_bytes
    return result


def draw(axes: Any, plan: MemoryPlan, cost: Costs, budget: float) -> None:
    """Fixed, dense weights, held and transient bytes stacked over the moments of a step; the budget as a line."""
    dense = sum(cost.cached.bytes_per_layer[: plan.cached_layers]) if cost.cached else 0
    steps = moments(plan, cost)
    parts = {
        "weights, gradients, optimizer": [cost.fixed_bytes / GIB] * len(steps),
        "dense weights": [dense / GIB] * len(steps),
        "kept by the layers": [held / GIB for held, _ in steps],
        "transient": [transient / GIB for _, transient in steps],
    }
    colours = ["#9aa0a6", "#d08c2e", "#2f7d4f", "#8fc1a5"]
    axes.stackplot(range(len(steps)), *parts.values(), labels=parts, colors=colours, step="mid")
    axes.axhline(budget, color="#a33", linewidth=0.8, linestyle="--")
    axes.axvline(len(plan.levels), color="#555", linewidth=0.6)
    axes.set_title(describe(plan).replace("; ", "\n"), fontsize=8, loc="left")
    axes.set_xlabel("layers forward, head, layers backward", fontsize=8)
    axes.set_ylabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--budgets", default="12,24,48,120", help="GiB, separated by commas")
    parser.add_argument("--host", type=float, default=64, help="GiB of host memory")
    options = parser.parse_args()
    budgets, cost = [float(value) for value in options.budgets.split(",")], costs(options.tokens)
    figure, all_axes = plt.subplots(1, len(budgets), figsize=(4.2 * len(budgets), 4), squeeze=False)
    for axes, budget in zip(all_axes[0], budgets, strict=True):
        draw(axes, choose(cost, int(budget * GIB), int(options.host * GIB)), cost, budget)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(options.target, dpi=130)


if __name__ == "__main__":
    main()
