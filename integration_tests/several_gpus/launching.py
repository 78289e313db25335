"""Cases in two processes, on the CPU over gloo or on GPUs under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from integration_tests import child
from integration_tests.several_gpus.cases import Case, described

SCRIPT = "from integration_tests.several_gpus import cases; cases.main()"
TIMEOUT = 300
"""Seconds after which processes that wait for each other have failed."""


class Outcome(NamedTuple):
    """What came of a case in one process."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    report: dict[str, Any]
    collectives: dict[str, int]
    evaluation: list[float]
    logits: str = ""
    """Type of the logits that a training pass gave."""
    held: list[str] | None = None
    """The parameters whose memory from before they were sharded was still there afterwards; of a loop."""

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
    (_fork if all(case.device == "cpu" for case in cases) else _torchrun)(folder, processes)
    return {case.name: [_read(folder / f"{case.name}.{rank}.pt") for rank in range(processes)] for case in cases}


def _fork(folder: Path, processes: int) -> None:
    """With the variables that torchrun sets; most of the seconds of its processes would go into imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    starts = (child.Start(SCRIPT, (folder,), {**shared, **rank}, folder=folder) for rank in ranks)
    done = child.fork(*starts, timeout=TIMEOUT)
    failed = [process.stderr[-6000:] for process in done if process.returncode]
    assert not failed, "\n".join(failed)


def _torchrun(folder: Path, processes: int) -> None:
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1", "--nproc_per_node", str(processes)]
    command = [*torchrun, "-m", "integration_tests.several_gpus.cases", str(folder)]
    roots = [str(child.ROOT / name) for name in (".", "plugins", "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-12000:]


def _read(path: Path) -> Outcome:
    found = torch.load(path, weights_only=False, map_location="cpu")
    return Outcome(**{"evaluation": [], **found})
