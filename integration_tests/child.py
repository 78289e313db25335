"""Scripts in child processes: new ones for what depends on what a process imports first, forked ones for the rest."""

from __future__ import annotations

import contextlib
import gc
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
"""Seconds after which processes, which may wait for each other, have failed."""
IMPORTED = (
    "torch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "trl.trainer.sft_trainer",
)
"""What forked processes find imported, none of it ours: it takes longer than what most tests do with it."""
GRACE = 20
"""Seconds in which processes end that are asked to."""
OPTIONAL = ("bitsandbytes", "networkx", "scipy", "sklearn", "torchao", "wandb")
"""Packages that hosts import where they find them, and that take half of the seconds of ``import trl``."""
INTERPRET = "TRITON_INTERPRET"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process in which the package is installed, with the entry points of pyproject.toml.

    Their metadata are written to ``folder``, as an installer would; the code is that of this repository.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    sections = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(sections))
    paths = [str(folder), str(ROOT), str(ROOT / "plugins"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def without_optional(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """``environment``, in which no process finds the packages in ``OPTIONAL``; ``folder`` is empty.

    Nor does it look for garbage while it imports, of which there is none: that would be a fifth of the seconds.
    """
    script = f"import gc, sys\ngc.set_threshold(100_000)\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    (folder / "sitecustomize.py").write_text(script)
    paths = [str(folder), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def lines(*scripts: str) -> str:
    """Scripts one after the other, each without its indentation."""
    return "\n".join(map(inspect.cleandoc, scripts))


def run(script: str, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with ``arguments`` in a child process, which must succeed; its output is in the result."""
    command = [sys.executable, "-W", "ignore", "-c", lines(script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def ended(process: subprocess.Popen[bytes], seconds: float | None, ask: signal.Signals = signal.SIGTERM) -> bool:
    """Whether ``process``, the first of a session, ends in time; what it has started ends with it.

    After ``seconds``, or when somebody interrupts us, it gets ``ask``, and time to write what it has found and to end
    what is in sessions of its own, as torchrun's processes are.
    """
    try:
        process.wait(seconds)
        return True
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
        process.send_signal(ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        if isinstance(why, KeyboardInterrupt):
            raise
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Start(NamedTuple):
    """A script for a forked process.

    Attributes:
        script: its source.
        arguments: ``sys.argv`` after the first.
        environment: variables beside those of this process.
        paths: where it finds modules first.
        folder: its working directory.
    """

    script: str
    arguments: tuple[object, ...] = ()
    environment: Mapping[str, str] = {}
    paths: tuple[str, ...] = ()
    folder: Path = Path("/")


def fork(*starts: Start, timeout: float = TIMEOUT) -> list[subprocess.CompletedProcess[str]]:
    """Run scripts at the same time, each in a fork of one process that has imported ``IMPORTED`` and done nothing.

    For scripts that need a process of their own, but not to be the first to import anything. Nothing runs on a GPU in
    them: what is imported may have asked for devices, after which CUDA refuses forks.

    Raises:
        TimeoutError: one has not ended after ``timeout`` seconds; all are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder, f"{i}.{name}") for name in ("out", "err")] for i in range(len(starts))]
        processes = [_started(start, *map(str, output)) for start, output in zip(starts, outputs, strict=True)]
        try:
            end = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            read = [[path.read_text() if path.exists() else "" for path in output] for output in outputs]
            if any(process.is_alive() for process in processes):
                raise TimeoutError("\n".join(err[-6000:] for _, err in read))
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode or 0 for process in processes]
    return [
        subprocess.CompletedProcess(start.script, code, *texts)
        for start, code, texts in zip(starts, codes, read, strict=True)
    ]


def _started(start: Start, out: str, err: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(
        target=_run, args=(start._replace(environment={**os.environ, **start.environment}), out, err)
    )
    before = os.environ.get(INTERPRET)
    # The process that is forked is started with the first one. Triton reads the variable as it is imported for its own
    # functions, and at a kernel's definition for others.
    os.environ[INTERPRET] = "1"
    try:
        process.start()
    finally:
        os.environ.pop(INTERPRET)
        if before is not None:
            os.environ[INTERPRET] = before
    return process


def _run(start: Start, out: str, err: str) -> None:
    """What the fork does."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    gc.freeze()  # what was imported is not looked at again each time that a trainer collects
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.folder)
    sys.path[:0] = start.paths
    sys.argv = ["-c", *map(str, start.arguments)]
    exec(compile(start.script, "<script>", "exec"), {"__name__": "__main__"})
