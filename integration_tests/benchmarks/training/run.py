"""The suite: every contender on every workload, beside each other in rounds, each in a process of its own.

Results are written to OUT/training.json as they come; a call with the same OUT goes on where the last one ended, so
the suite can run in slices (``--seconds`` ends one in time). Running out of memory is a result; a run that fails or
takes too long is marked, and tried again by the next call. At the end the results are judged (exit code 1 where a run
of ours differs from stock's losses or failed) and reported.

usage: python -m integration_tests.benchmarks.training.run --out DIR [--only full,growth] [--contenders stock,sloth]
           [--rounds 2] [--seconds 560] [--timeout 500] [--site unsloth=FOLDER] [--scale tiny] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from integration_tests import child
from integration_tests.benchmarks.training import contenders, judge, models, results, workloads
from integration_tests.benchmarks.training.contenders import CONTENDERS, DRIVER_GIB
from integration_tests.benchmarks.training.measure import MARK, format_points
from integration_tests.benchmarks.training.results import Result, Suite
from integration_tests.benchmarks.training.workloads import Point
from sloth_backend.budget import SPARE_SHARE

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "integration_tests.benchmarks.training"
MISJUDGED = 0.01
WORK = Path(tempfile.gettempdir()) / "training-benchmark"


@dataclass(frozen=True)
class Settings:
    """How to run: where models and logs go, folders of packages by kind of contender, limits in seconds."""

    work: Path = WORK
    sites: dict[str, str] = field(default_factory=dict)
    tiny: bool = False
    steps: int | None = None
    timeout: float = 900


@dataclass(frozen=True)
class Job:
    """One process: a contender's missing points of a workload in a round, and the budget of one that has another's."""

    workload: str
    contender: str
    round: int
    points: tuple[Point, ...]
    budget_gb: float | None = None


def jobs(suite: Suite, asked: list[str], who: list[str], rounds: int, tiny: bool) -> Iterator[Job]:
    """What is still to be measured, in order: contenders side by side, round by round, one workload after the other."""
    for name in asked:
        workload = workloads.get(name, tiny)
        for round_ in range(rounds):
            for contender in who:
                if not CONTENDERS[contender].runs(workload) or (CONTENDERS[contender].truth and round_):
                    continue
                wanted = [point for point in workload.points if CONTENDERS[contender].takes(workload, point)]
                points = results.missing(suite, name, contender, round_, wanted)
                if points:
                    yield Job(name, contender, round_, tuple(points))


def environment(settings: Settings, kind: str) -> dict[str, str]:
    """A child's: this repository and the contender's own packages on its path, our switch for our own runs alone."""
    paths = [ROOT, ROOT / "plugins", ROOT / "kernels", settings.sites.get(kind, ""), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(path) for path in paths if str(path))
    return {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(kind == "sloth"))}


def ensure_model(settings: Settings, workload: workloads.Workload) -> Path:
    """The workload's model, written by a child if it is not there yet, so that the GPU's memory is free again.

    Raises:
        RuntimeError: the child failed.
    """
    folder = settings.work / models.folder_name(workload.model, workload.nf4, settings.tiny)
    if models.is_written(folder):
        return folder
    flags = [flag for flag, on in (("--bf16", not workload.nf4), ("--tiny", settings.tiny)) if on]
    command = [sys.executable, "-m", f"{PACKAGE}.models", workload.model, str(folder), *flags]
    done = subprocess.run(command, env=environment(settings, "stock"), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"writing {folder.name} failed: {done.stderr[-2000:]}")
    return folder


def launch(job: Job, settings: Settings) -> list[Result]:
    """Measure in a child; what it finished counts, however it ends."""
    try:
        model = ensure_model(settings, workloads.get(job.workload))
    except RuntimeError as error:
        return collect(job, str(error), "no model")
    kind = CONTENDERS[job.contender].kind
    log = settings.work / "logs" / f"{job.workload}-{job.contender}-{job.round}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command, around = measuring(job, model, settings), environment(settings, kind)
    with log.open("w") as file:
        started = subprocess.Popen(command, env=around, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        how = ending(started, settings.timeout)
    return collect(job, log.read_text(errors="replace"), how)


def measuring(job: Job, model: Path, settings: Settings) -> list[str]:
    """The child's command line."""
    command = [sys.executable, "-m", f"{PACKAGE}.measure", job.contender, job.workload]
    command += ["--model", str(model), "--points", format_points(list(job.points))]
    command += ["--tiny"] * settings.tiny + (["--steps", str(settings.steps)] if settings.steps else [])
    return command + (["--budget", str(job.budget_gb)] if job.budget_gb is not None else [])


def ending(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How a measurement ended, which may take so many seconds."""
    return f"ended with {process.returncode}" if child.ended(process, seconds) else f"took longer than {seconds:g} s"


def collect(job: Job, log: str, ending: str) -> list[Result]:
    """The results in a child's output, and one for each point that it did not reach."""
    found = [json.loads(line.partition(MARK)[2]) for line in log.splitlines() if line.startswith(MARK)]
    reached = {(result["batch"], result["length"]) for result in found}
    status = "timeout" if ending.startswith("took") else "oom" if "OutOfMemoryError" in log else "error"
    about = {
        "workload": job.workload,
        "contender": job.contender,
        "status": status,
        "error": f"{ending}: {log[-1000:]}",
    }
    lost = [
        {**about, "batch": batch, "length": length} for batch, length in job.points if (batch, length) not in reached
    ]
    return [{**result, "round": job.round} for result in [*found, *lost]]


def run_jobs(out: Path, todo: Iterator[Job], settings: Settings, seconds: float) -> None:
    """Run them in order until the time is over; the file is written after each."""
    start = time.monotonic()
    for job in todo:
        if time.monotonic() - start > seconds:
            print(f"{seconds:g} s are over; the same command goes on from here", flush=True)
            return
        budgeted = with_budget(job, results.load(out))
        if budgeted is None:
            wait_for_another(out, job)
            continue
        done = launch(budgeted, settings)
        suite = results.load(out)
        suite["absent"].pop(job.contender, None)
        for result in done:
            results.add(suite, result)
            print(describe(result), flush=True)
        results.save(out, suite)


def with_budget(job: Job, suite: Suite) -> Job | None:
    """The job with the memory that another contender took; None where that one has no result yet."""
    within = CONTENDERS[job.contender].within
    if not within:
        return job
    peak = results.latest_peak(suite, job.workload, within, job.points)
    return None if peak is None else replace(job, budget_gb=card_within(peak))


def card_within(peak_gib: float) -> float:
    """GB of the card on which a plan takes at most ``peak_gib``: a prediction may be wrong by ``MISJUDGED``."""
    return round(peak_gib * (1 - MISJUDGED) / (1 - SPARE_SHARE) + DRIVER_GIB, 3)


def wait_for_another(out: Path, job: Job) -> None:
    """Say, here and in the file, that the job has no budget yet; a later call tries again."""
    why = f"waits for a result of {CONTENDERS[job.contender].within}, whose memory is its budget, on {job.workload}"
    print(f"{job.workload} round {job.round} {job.contender}: {why}", flush=True)
    suite = results.load(out)
    suite["absent"][job.contender] = why
    results.save(out, suite)


def describe(result: Result) -> str:
    """One line for the terminal."""
    name = f"{result['workload']} {result['batch']}x{result['length']} round {result['round']} {result['contender']}"
    if result["status"] != "ok":
        return f"{name}: {result['status']} {result.get('error', '')[-300:]}"
    return f"{name}: {result['step_seconds']} s, {result['tokens_per_second']} tok/s, {result['peak_gib']} GiB"


def split_absent(who: list[str], sites: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Those that are installed, and why the others do not run."""
    here = [name for name in who if contenders.installed(name, sites)]
    return here, {n: f"{CONTENDERS[n].package} is not installed" for n in who if n not in here}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of training.json, the table and the pictures")
    parser.add_argument("--only", type=workloads.names, default="all", help="workloads or groups")
    parser.add_argument("--contenders", type=contenders.names, default="all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so many")
    parser.add_argument("--timeout", type=float, default=Settings.timeout, help="seconds that one process may take")
    parser.add_argument("--site", action="append", default=[], help="KIND=FOLDER of packages, before all others")
    parser.add_argument("--work", type=Path, default=WORK, help="where models and logs go")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: two-layer models, for a CPU")
    parser.add_argument("--steps", type=int, help="steps of each run instead of the workload's own")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, judge, report."""
    options = parse(arguments)
    sites = dict(site.split("=", 1) for site in options.site)
    settings = Settings(options.work, sites, options.scale == "tiny", options.steps, options.timeout)
    who, absent = split_absent(options.contenders, sites)
    suite = results.load(options.out)
    suite["absent"] = {name: why for name, why in {**suite["absent"], **absent}.items() if name not in who}
    results.save(options.out, suite)
    todo = jobs(suite, options.only, who, options.rounds, settings.tiny)
    run_jobs(options.out, todo, settings, options.seconds)
    return finish(options.out)


def finish(out: Path) -> int:
    """Judge and report what there is."""
    from integration_tests.benchmarks.training import report

    suite = results.load(out)
    report.write(out, suite)
    print("\n".join(judge.lines(suite)))
    return int(not judge.passes(suite))


if __name__ == "__main__":
    sys.exit(main())
