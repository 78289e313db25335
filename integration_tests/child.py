"""Scripts in child processes, for what depends on what a process imports first."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def lines(*scripts: str) -> str:
    """Scripts one after the other, each without its indentation."""
    return "\n".join(map(inspect.cleandoc, scripts))


def run(script: str, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with ``arguments`` in a child process, which must succeed; its output is in the result."""
    command = [sys.executable, "-W", "ignore", "-c", lines(script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return result
