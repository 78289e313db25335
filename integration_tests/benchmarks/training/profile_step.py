"""Where the time of one step goes on a CUDA GPU: kernel time by phase, forward and backward apart, and the idle share.

Trains a contender until the clock has settled, traces one step (kernels only, so that the host is hardly slower), and
writes DIR/profile-CONTENDER-WORKLOAD.json and .md. The step's time is the median of the steps before it, without the
tracer, each from the end of the one before to its own; a trainer's says what of it went into making batches.

usage: python -m integration_tests.benchmarks.training.profile_step CONTENDER WORKLOAD --out DIR [--model FOLDER]
           [--point 1x65536] [--warmup 24]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration_tests.benchmarks.training import kernel_phases, loading, run, workloads
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.measure import parse_points
from integration_tests.benchmarks.training.workloads import Point

TIMED = 5
"""Steps after the workload's warm-up that are timed without the tracer; the next one is traced."""


class Stopwatch:
    """Sums the seconds inside functions, those that one calls within another counted once."""

    def __init__(self) -> None:
        self.seconds, self.inside, self.used = 0.0, 0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.used = True
            self.inside += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1
                self.seconds += 0.0 if self.inside else time.perf_counter() - start

        return timed


class Tracer:
    """Traces the last of ``steps``, times those before; ``begin`` and ``end`` stand around every step."""

    def __init__(self, steps: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        from integration_tests.benchmarks.training.clock import wait

        self.wait = wait
        self.step, self.last = 0, steps - 1
        self.start = 0.0
        self.all_seconds: list[float] = []
        self.batches = Stopwatch()
        self.all_batch_seconds: list[float] = []
        activity = ProfilerActivity.CUDA if loading.device().type == "cuda" else ProfilerActivity.CPU
        self.profiler: Any = profile(activities=[activity])

    def begin(self) -> None:
        """Before a step."""
        if self.step == self.last:
            self.wait()
            self.profiler.start()

    def end(self) -> None:
        """After it."""
        self.wait()
        if self.last - TIMED <= self.step < self.last:
            self.all_seconds.append(time.perf_counter() - self.start)
            self.all_batch_seconds.append(self.batches.seconds)
        if self.step == self.last:
            self.profiler.stop()
        self.step += 1
        self.start, self.batches.seconds = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Of a step."""
        return statistics.median(self.all_seconds)

    @property
    def batch_seconds(self) -> float | None:
        """Of making a step's batches; None where nobody made any."""
        return statistics.median(self.all_batch_seconds) if self.batches.used else None

    def events(self) -> list[dict[str, Any]]:
        """Of the traced step."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(file))
            return json.loads(file.read_text())["traceEvents"]


def trace_trainer(name: str, workload: workloads.Workload, folder: Path, point: Point) -> Tracer:
    """Through the contender's trainer."""
    from transformers import TrainerCallback

    from integration_tests.benchmarks.training import trainer_runs

    tracer = Tracer(workload.steps)

    class Around(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            tracer.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tracer.end()

    trainer, _ = trainer_runs.make_trainer(CONTENDERS[name], workload, folder, point)
    trainer.add_callback(Around())
    for method in ("data_collator", "get_batch_samples"):
        setattr(trainer, method, tracer.batches.around(getattr(trainer, method)))
    trainer.train()
    return tracer


def trace_plain(name: str, workload: workloads.Workload, folder: Path, point: Point) -> Tracer:
    """In the plain loop."""
    from integration_tests.benchmarks.training import plain_runs

    tracer = Tracer(workload.steps)
    model = plain_runs.load(CONTENDERS[name], workload, folder)
    ids = plain_runs.token_ids(point, model.config.vocab_size)
    optimizer = plain_runs.make_optimizer(model, workload)
    for _ in range(workload.steps):
        tracer.begin()
        plain_runs.step(model, optimizer, ids)
        tracer.end()
    return tracer


TRACES: dict[str, Callable[..., Tracer]] = {"trainer": trace_trainer, "plain": trace_plain}


def main() -> None:
    """Profile one step and write the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=[n for n, c in CONTENDERS.items() if c.kind != "axolotl" and not c.within])
    parser.add_argument("workload", choices=workloads.WORKLOADS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder that models.py wrote; written if left out")
    parser.add_argument("--warmup", type=int, help="steps before; the workload's own without it")
    parser.add_argument("--point", type=parse_points, help="batch x length; the workload's first without it")
    options = parser.parse_args()
    loading.first_imports(CONTENDERS[options.contender].kind)
    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch; the kernels' time is measured on one")
    before = workloads.WORKLOADS[options.workload].warmup if options.warmup is None else options.warmup
    workload = workloads.get(options.workload, steps=before + TIMED + 1)
    point = options.point[0] if options.point else workload.points[0]
    folder = options.model or run.ensure_model(run.Settings(), workload)
    loading.imitate_card(CONTENDERS[options.contender].card_gib)
    tracer = TRACES[workload.loop](options.contender, workload, folder, point)
    write(options.out, f"profile-{options.contender}-{options.workload}", tracer)


def write(folder: Path, name: str, tracer: Tracer) -> None:
    """The sums as JSON and as a table."""
    sums = kernel_phases.summarise(tracer.events(), tracer.seconds * 1e6)
    if tracer.batch_seconds is not None:
        sums["batch_seconds"] = tracer.batch_seconds
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(sums, indent=1) + "\n")
    text = f"# Where one step goes: {name.removeprefix('profile-')}\n\n{kernel_phases.table(sums)}"
    (folder / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
