"""One contender, one workload, one process: a line of JSON for each point, marked RESULT.

usage: python -m integration_tests.benchmarks.training.measure CONTENDER WORKLOAD --model FOLDER [--tiny] [--steps N]
           [--points 1x4096,1x8192] [--budget GIB]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training import loading, workloads
from integration_tests.benchmarks.training.contenders import CONTENDERS, Contender
from integration_tests.benchmarks.training.workloads import Point

MARK = "RESULT "
HOME = __name__.rpartition(".")[0] if __name__ != "__main__" else "integration_tests.benchmarks.training"


def measure(
    name: str,
    workload: str,
    model: Path,
    points: list[Point],
    tiny: bool = False,
    steps: int | None = None,
    budget_gb: float | None = None,
) -> Iterator[dict[str, Any]]:
    """The results of one contender, each as soon as it is there; running out of memory is one, a failure another.

    Args:
        name: of ``CONTENDERS``.
        workload: of ``WORKLOADS``.
        model: the folder of the workload's model.
        points: which of its figures.
        tiny: in the size of a test.
        steps: instead of the workload's own.
        budget_gb: GiB that a contender which trains within another's memory may use.

    Raises:
        ValueError: the contender needs a budget and there is none.
    """
    contender = CONTENDERS[name].with_budget(budget_gb)
    work = workloads.get(workload, tiny, steps, contender.steps)
    loading.first_imports(contender.kind)
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(loading.device())
    clock = importlib.import_module(f"{HOME}.clock")
    about = {"workload": workload, "contender": name, "device": clock.device_name()}
    about["versions"] = clock.versions(contender.kind)
    if budget_gb is not None:
        about["budget_gb"] = budget_gb
    left = list(points)
    try:
        loading.imitate_card(contender.card_gib)
        for result in _run(contender, work, model, points, tiny):
            left.remove((result["batch"], result["length"]))
            yield {**about, **result}
    except torch.OutOfMemoryError:
        yield from ({**about, "status": "oom", "batch": batch, "length": length} for batch, length in left)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:2000]
        yield from ({**about, "status": "error", "batch": b, "length": n, "error": reason} for b, n in left)
    finally:
        gc.collect()


def _run(
    contender: Contender, work: workloads.Workload, model: Path, points: list[Point], tiny: bool
) -> Iterator[dict[str, Any]]:
    if contender.kind == "axolotl":
        return importlib.import_module(f"{HOME}.axolotl_runs").run(contender, work, model, points, tiny)
    return importlib.import_module(f"{HOME}.{work.loop}_runs").run(contender, work, model, points)


def parse_points(text: str) -> list[Point]:
    """``1x4096,2x2048`` as pairs of batch and length."""
    pairs = (point.split("x") for point in text.split(",") if point)
    return [(int(batch), int(length)) for batch, length in pairs]


def format_points(points: list[Point]) -> str:
    """The other way round."""
    return ",".join(f"{batch}x{length}" for batch, length in points)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("workload", choices=workloads.WORKLOADS)
    parser.add_argument("--model", type=Path, required=True, help="a folder that models.py wrote")
    parser.add_argument("--points", default="", help="batch x length, separated by commas; all without it")
    parser.add_argument("--tiny", action="store_true", help="the size of a test, for a CPU")
    parser.add_argument("--steps", type=int, help="instead of the workload's own")
    parser.add_argument("--budget", type=float, help="GiB, for a contender that trains within another's memory")
    options = parser.parse_args()
    points = parse_points(options.points) or list(workloads.get(options.workload, options.tiny).points)
    scale = options.tiny, options.steps, options.budget
    for result in measure(options.contender, options.workload, options.model, points, *scale):
        if os.environ.get("RANK", "0") == "0":
            print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
