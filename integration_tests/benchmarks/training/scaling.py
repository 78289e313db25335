"""Weak scaling: the same rows a GPU on 1, 2, ... GPUs of one machine, under DDP; tokens a second beside one GPU's.

Each measurement is a ``torchrun`` of ``measure.py``, whose processes train on rows of their own. Writes
OUT/scaling.json and scaling.md; the share of perfect scaling is tokens a second of n GPUs over n times those of one.
With --together, contenders that leave GPUs free run beside each other, each on GPUs of its own. Ends with 1 where one
of them failed.

usage: python -m integration_tests.benchmarks.training.scaling --out DIR --model FOLDER [--workload full]
           [--contenders stock,sloth] [--gpus 1,2] [--steps 6] [--together] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training import contenders, run, workloads
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.measure import MARK
from integration_tests.benchmarks.training.report import table

Result = dict[str, Any]
STOCK = "stock"


def measured(contender: str, gpus: int, options: argparse.Namespace, place: int = 0) -> Result:
    """What the first process of ``gpus`` printed, on the ``place``-th of as many.

    It is of status ``error`` where nothing was printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc_per_node", str(gpus), "-m", f"{run.PACKAGE}.measure", contender, options.workload]
    command += ["--model", str(options.model), "--steps", str(options.steps)] + ["--tiny"] * options.tiny
    around = environment(contender, gpus, options, place)
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(command, env=around, cwd=run.ROOT, stdout=log, stderr=log, start_new_session=True)
        how = run.ending(started, options.timeout)
        log.seek(0)
        text = log.read()
    lines = [line.partition(MARK)[2] for line in text.splitlines() if line.startswith(MARK)]
    if lines:
        return {**json.loads(lines[-1]), "gpus": gpus}
    rows, length = workloads.get(options.workload, options.tiny).points[0]
    about = {"workload": options.workload, "batch": rows, "length": length, "contender": contender, "gpus": gpus}
    return {**about, "status": "error", "error": f"{how}: {text[-3000:]}"}


def environment(contender: str, gpus: int, options: argparse.Namespace, place: int) -> dict[str, str]:
    """Its GPUs, and as many threads as any other process has: torchrun would leave one alone all cores."""
    around = run.environment(run.Settings(), CONTENDERS[contender].kind)
    around.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(options.gpus))))
    if room(gpus, options) > 1:
        around["CUDA_VISIBLE_DEVICES"] = ",".join(str(place * gpus + i) for i in range(gpus))
    return around


def room(gpus: int, options: argparse.Namespace) -> int:
    """How many measurements of ``gpus`` there is room for at a time."""
    return max(options.gpus) // gpus if options.together else 1


def with_shares(results: Sequence[Result]) -> list[Result]:
    """Each with its ``share`` of perfect scaling and ``times_stock``, its tokens a second over stock's on as many GPUs.

    None where there is nothing to compare with.
    """
    done = {(r["contender"], r["gpus"]): r["tokens_per_second"] for r in results if r["status"] == "ok"}
    return [
        {
            **r,
            "share": _share(r, done.get((r["contender"], 1))),
            "times_stock": _times(r, done.get((STOCK, r["gpus"]))),
        }
        for r in results
    ]


def _times(result: Result, stock: float | None) -> float | None:
    if stock is None or result["status"] != "ok":
        return None
    return round(result["tokens_per_second"] / stock, 3)


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
            "" if r["times_stock"] is None else f"{r['times_stock']:.2f}",
        )
        for r in results
    ]
    devices = ", ".join(sorted({r["device"] for r in results if "device" in r}))
    title = [f"# Weak scaling of `{workload}` under DDP, {devices}", ""]
    return "\n".join([*title, *table(("contender", "GPUs", "s/step", "tok/s", "of perfect", "of stock's tok/s"), rows)])


def all_measured(options: argparse.Namespace) -> Iterator[Result]:
    """Every contender on every number of GPUs, side by side."""
    for gpus in options.gpus:
        at_once = room(gpus, options)
        for start in range(0, len(options.contenders), at_once):
            group = options.contenders[start : start + at_once]
            with ThreadPoolExecutor(at_once) as pool:
                running = [pool.submit(measured, name, gpus, options, place) for place, name in enumerate(group)]
                for result in (one.result() for one in running):
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
    parser.add_argument("--together", action="store_true", help="contenders beside each other where GPUs are free")
    parser.add_argument("--tiny", action="store_true", help="the size of a test, for a CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one measurement may take")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; what was measured is written after each."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[Result] = []
    for result in all_measured(options):
        found.append(result)
        results = with_shares(found)
        (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "scaling.md").write_text(page(results, options.workload))
    return int(any(result["status"] != "ok" for result in found))


if __name__ == "__main__":
    sys.exit(main())
