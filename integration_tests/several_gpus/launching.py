"""Cases under torchrun, two processes on the CPU over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from integration_tests.child import ROOT
from integration_tests.several_gpus.cases import Case, described

TIMEOUT = 300
"""Seconds after which processes that wait for each other have failed."""


class Outcome(NamedTuple):
    """What came of a case in one process."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    report: dict[str, Any]
    collectives: dict[str, int]
    evaluation: list[float]

    def changed(self, capability: str) -> list[str]:
        """Subjects of its findings that say that something was changed."""
        return [f["subject"] for f in self._findings("changed", capability)]

    def reasons(self, action: str, capability: str) -> list[str]:
        """Reasons of its findings."""
        return [f["reason"] for f in self._findings(action, capability)]

    def _findings(self, action: str, capability: str) -> list[dict[str, Any]]:
        return [f for f in self.report["findings"] if (f["action"], f["capability"]) == (action, capability)]


def launch(cases: list[Case], folder: Path, processes: int = 2) -> dict[str, list[Outcome]]:
    """Name of each case -> what came of it in each process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(described(cases))
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", str(processes), "-m", "integration_tests.several_gpus.cases", str(folder)]
    roots = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-12000:]
    return {case.name: [_read(folder / f"{case.name}.{rank}.pt") for rank in range(processes)] for case in cases}


def _read(path: Path) -> Outcome:
    found = torch.load(path, weights_only=False, map_location="cpu")
    return Outcome(**{"evaluation": [], **found})
