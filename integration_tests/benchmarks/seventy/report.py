"""Losses of ours beside stock's, and the page.

The rule, for every step: ``|ours - stock| <= RELATIVE * stock``. Both compute in bf16 and round in other places. The
benchmark of 8B models allows 3e-3 nats of some 12 where stock's own noise adds nothing (``training/judge.py``), that
is 2.5e-4; here layers are two and a half times as many, and there is no second round of stock to measure its noise by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.report import table

Result = dict[str, Any]
REFERENCE = "stock"
RELATIVE = 5e-4
FILE = "seventy.json"


def distance(result: Result, reference: Result) -> float:
    """The largest of all steps, relative to the reference's loss; infinite where one is missing or no number."""
    if not reference["losses"] or len(result["losses"]) != len(reference["losses"]):
        return float("inf")
    apart = [abs(a - b) / abs(b) for a, b in zip(result["losses"], reference["losses"], strict=True)]
    return max(apart) if all(math.isfinite(value) for value in apart) else float("inf")


def judged(results: Sequence[Result]) -> list[Result]:
    """Each with its ``distance`` to stock, None where that has no result or it is stock itself."""
    stock = next((result for result in results if result["contender"] == REFERENCE), None)
    apart = [None if stock is None or result is stock else distance(result, stock) for result in results]
    return [{**result, "distance": value} for result, value in zip(results, apart, strict=True)]


def agrees(results: Sequence[Result]) -> bool:
    """Whether every loss is within the rule."""
    return all(r["distance"] is None or r["distance"] <= RELATIVE for r in results)


def save(folder: Path, results: Sequence[Result]) -> None:
    """Write the file of results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(results, indent=1) + "\n")


def load(folder: Path) -> list[Result]:
    """What was measured; nothing where there is no file."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else []


def page(results: Sequence[Result]) -> str:
    """The results as Markdown.

    Raises:
        ValueError: nothing was measured.
    """
    if not results:
        raise ValueError("nothing was measured yet: run the benchmark first")
    return "\n".join([*_head(results[0]), *_speed(results), *_memory(results), *_losses(results), *_said(results)])


def _head(first: Result) -> list[str]:
    size, versions = first["shape"], ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    return [
        "# QLoRA of a 70B model on several GPUs",
        "",
        f"Llama 3.1 70B's shapes ({size['layers']} layers, {size['hidden']} wide, random weights), double-quantised "
        f"NF4, LoRA of rank {first['rank']} on all linears, FSDP2 through accelerate on {first['processes']} x "
        f"{first['device']}; {first['rows']} rows of {first['length']:,} tokens a pass and GPU, "
        f"{first['accumulation']} passes a step, AdamW. Medians of {first['steps'] - first['warmup']} steps after "
        f"{first['warmup']}. Written by `python -m integration_tests.benchmarks.seventy`.",
        "",
        f"Versions: {versions}.",
        "",
    ]


def _speed(results: Sequence[Result]) -> list[str]:
    rows = [
        (
            CONTENDERS[r["contender"]].title,
            f"{r['step_seconds']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
            _gib(r, "train", "peak_gib"),
            _gib(r, "train", "reserved_gib"),
        )
        for r in results
    ]
    return table(("contender", "s/step", "tok/s", "peak GiB", "reserved GiB"), rows)


def _memory(results: Sequence[Result]) -> list[str]:
    """Before the first step, by phase."""
    phases = ("build", "adapt", "prepare")
    rows = [
        (
            CONTENDERS[r["contender"]].title,
            *(_gib(r, phase, "peak_gib") for phase in phases),
            _gib(r, "prepare", "now_gib"),
            f"{sum(r['ranks'][0][phase]['seconds'] for phase in phases):.0f}",
        )
        for r in results
    ]
    header = ("GiB before the first step", "build", "adapters", "sharding", "after it", "seconds")
    return table(header, rows)


def _gib(result: Result, phase: str, name: str) -> str:
    """The largest of all GPUs."""
    return f"{max(rank[phase][name] for rank in result['ranks']):.1f}"


def _losses(results: Sequence[Result]) -> list[str]:
    rows = [
        (
            CONTENDERS[r["contender"]].title,
            " ".join(f"{loss:.4f}" for loss in r["losses"]),
            "" if r["distance"] is None else f"{r['distance']:.1e}",
        )
        for r in results
    ]
    rule = f"Losses may differ from stock's by {RELATIVE:g} of them (`seventy/report.py` says why)."
    return [rule, "", *table(("contender", "losses", "largest difference"), rows)]


def _said(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        if "plan" in result:
            total = result["shape"]["layers"]
            lines += [
                f"{CONTENDERS[result['contender']].title}: {result['layers_changed']} of {total} layers as programs."
            ]
            lines += [f"Plan: {reason}." for reason in result["plan"]] + [""]
    return lines
