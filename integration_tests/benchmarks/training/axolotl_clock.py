"""An Axolotl plugin that only measures. It writes one point's result to the file that TRAINING_BENCHMARK_JOB names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from integration_tests.benchmarks.training import workloads
from integration_tests.benchmarks.training.clock import Clock, allocated_gib, figures
from integration_tests.benchmarks.training.rows import start_adapters

JOB = "TRAINING_BENCHMARK_JOB"
"""Environment variable: a JSON object of ``workload``, ``tiny``, ``steps``, ``point`` and ``result`` (a path)."""


class ReportingClock(Clock):
    """A clock that writes what it measured when training ends."""

    def __init__(self, base_gib: float) -> None:
        super().__init__()
        self.base_gib = base_gib

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Write the result."""
        job = json.loads(os.environ[JOB])
        workload = workloads.get(job["workload"], job["tiny"], job["steps"])
        batch, length = job["point"]
        result = figures(workload, (batch, length), self.seconds, self.losses)
        Path(job["result"]).write_text(json.dumps({**result, "base_gib": round(self.base_gib, 3)}))


class ClockPlugin(BasePlugin):
    """Starts every run from the same adapters and clocks it."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The clock."""
        base = allocated_gib()
        start_adapters(trainer.model)
        return [ReportingClock(base)]
