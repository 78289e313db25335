"""Weak scaling: the same rows a GPU on 1, 2, ... GPUs of one machine, under DDP; tokens a second beside one GPU's.

Each measurement is a ``torchrun`` of ``measure.py``, whose processes train on rows of their own. Writes
OUT/scaling.json and scaling.md; the share of perfect scaling is tokens a second of n GPUs over n times those of one.

usage: python -m integration_tests.benchmarks.training.scaling --out DIR --model FOLDER [--workload full]
           [--contenders stock,sloth] [--gpus 1,2] [--steps 6] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training import contenders, run, workloads
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.measure import MARK
from integration_tests.benchmarks.training.report import table

Result = dict[str, Any]


def measured(contender: str, gpus: int, options: argparse.Namespace) -> Result:
    """What the first process of ``gpus`` printed.

    Raises:
        RuntimeError: it printed no result.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command += ["-m", f"{run.PACKAGE}.measure", contender, options.workload, "--model", str(options.model)]
    command += ["--steps", str(options.steps)] + ["--tiny"] * options.tiny
    around = run.environment(run.Settings(), CONTENDERS[contender].kind)
    done = subprocess.run(command, env=around, cwd=run.ROOT, capture_output=True, text=True, timeout=options.timeout)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"{contender} on {gpus} GPUs gave no result: {done.stderr[-2000:]}")
    return {**json.loads(lines[-1]), "gpus": gpus}


def with_shares(results: Sequence[Result]) -> list[Result]:
    """Each with its ``share`` of perfect scaling; None where one GPU was not measured."""
    alone = {r["contender"]: r["tokens_per_second"] for r in results if r["gpus"] == 1 and r["status"] == "ok"}
    return [{**r, "share": _share(r, alone.get(r["contender"]))} for r in results]


def _share(result: Result, alone: float | None) -> float | None:
    if alone is None or result["status"] != "ok":
        return None
    return round(result["tokens_per_second"] / (result["gpus"] * alone), 4)


def page(results: Sequence[Result], workload: str) -> str:
    """The results as a table."""
    rows = [
        (
            CONTENDERS[r["contender"]].title,
            str(r["gpus"]),
            f"{r['step_seconds']:.3f}" if r["status"] == "ok" else r["status"],
            f"{r['tokens_per_second']:,.0f}" if r["status"] == "ok" else "",
            "" if r["share"] is None else f"{r['share']:.1%}",
        )
        for r in results
    ]
    devices = ", ".join(sorted({r["device"] for r in results if "device" in r}))
    title = [f"# Weak scaling of `{workload}` under DDP, {devices}", ""]
    return "\n".join([*title, *table(("contender", "GPUs", "s/step", "tok/s", "of perfect"), rows)])


def all_measured(options: argparse.Namespace) -> Iterator[Result]:
    """Every contender on every number of GPUs, side by side."""
    for gpus in options.gpus:
        for contender in options.contenders:
            result = measured(contender, gpus, options)
            print(run.describe({**result, "round": 0}), f"on {gpus}", flush=True)
            yield result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of scaling.json and scaling.md")
    parser.add_argument("--model", type=Path, required=True, help="a folder that models.py wrote")
    parser.add_argument("--workload", choices=workloads.WORKLOADS, default="full")
    parser.add_argument("--contenders", type=contenders.names, default=["stock", "sloth"])
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="the size of a test, for a CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one measurement may take")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report; what was measured is written after each."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[Result] = []
    for result in all_measured(options):
        found.append(result)
        results = with_shares(found)
        (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "scaling.md").write_text(page(results, options.workload))


if __name__ == "__main__":
    main()
