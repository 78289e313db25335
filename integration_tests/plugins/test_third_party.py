"""A third party's plugin, built and installed as a distribution of its own, beside the built-in ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration_tests import child

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "example-sloth-plugin"
version = "1.0"

[project.entry-points.sloth_backend]
example = "example_sloth_plugin"
"""

PLUGIN = '''
"""An op of its own, a built-in op replaced, the memory plan decided, a Finding for each."""

import dataclasses

from sloth_backend import Finding, MemoryPlan, Op, hookimpl
from sloth_backend.plan import KEEP, RECOMPUTE
from sloth_kernels.ops.rms_norm import OP as BUILTIN_RMS_NORM

calls = []


def counted_rms_norm(*args, **kwargs):
    calls.append("rms_norm")
    return BUILTIN_RMS_NORM.fn(*args, **kwargs)


@hookimpl
def sloth_ops():
    double_scale = Op("double_scale", lambda x: x * 2, lambda x: x + x, cases=tuple)
    return [double_scale, dataclasses.replace(BUILTIN_RMS_NORM, fn=counted_rms_norm)]


@hookimpl
def sloth_memory_plan(model, run):
    return MemoryPlan((RECOMPUTE, KEEP))


@hookimpl
def sloth_patch_model(model, ops, plan, edits):
    edits.set(model, "_example", "was here")
    return [Finding("changed", "model", f"doubles 21 to {ops['double_scale'].fn(21)} with {plan}", "double_scale")]
'''

SCRIPT = """
import json, sys
import torch
import sloth_backend
from integration_tests import tiny
from sloth_backend.manager import get_manager

tokenizer = tiny.make_tokenizer()
model = tiny.make_model(tokenizer)
before = model(input_ids=torch.arange(8)[None]).logits
sloth_backend.optimize(model, config={"print_report": False})
plugin = sys.modules["example_sloth_plugin"]
calls_before = len(plugin.calls)
after = model(input_ids=torch.arange(8)[None]).logits
report = sloth_backend.report(model)
mark = vars(model).get("_example")
calls = len(plugin.calls) - calls_before
sloth_backend.undo(model)
print(json.dumps({
    "names": get_manager().names(),
    "ops": {name: op.fn.__module__ for name, op in get_manager().ops().items()},
    "findings": report.to_dict()["findings"],
    "calls": calls,
    "norms": sum("norm" in name for name, _ in model.named_modules()),
    "distance": (after - before).abs().max().item(),
    "mark": mark,
    "undone": "_example" not in vars(model),
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example plugin."""
    return install(tmp_path_factory.mktemp("plugin"), PLUGIN)


def install(folder: Path, source: str) -> Path:
    """Build a distribution whose plugin module is ``source`` and install it into a folder of its own."""
    project, target = folder / "project", folder / "site"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "example_sloth_plugin.py").write_text(source)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(project)], check=True, timeout=120)
    return target


def run(script: str, site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a process that has imported nothing of ours and sees the repository and ``site``."""
    return child.fork(child.Start(script, (), {"HF_HUB_OFFLINE": "1", **environment}, (str(site),)))[0]


@pytest.fixture(scope="module")
def outcome(site: Path) -> dict[str, Any]:
    """What ``SCRIPT`` found with the plugin installed."""
    done = run(SCRIPT, site)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_is_called_before_the_builtins(outcome: dict[str, Any]) -> None:
    assert outcome["names"][0] == "example"
    assert "kernel_patching" in outcome["names"][1:]


def test_adds_an_op_and_wins_the_first_result(outcome: dict[str, Any]) -> None:
    (finding,) = [f for f in outcome["findings"] if f["plugin"] == "example"]
    assert finding["capability"] == "double_scale"
    assert finding["reason"] == "doubles 21 to 42 with 1 recompute, 1 keep"


def test_decides_what_layers_keep(outcome: dict[str, Any]) -> None:
    (finding,) = [f for f in outcome["findings"] if f["capability"] == "memory_plan"]
    assert finding["plugin"] == "layer_programs"
    assert finding["reason"].startswith("layers: 1 recompute, 1 keep; predicted peak")


def test_replaces_a_builtin_op(outcome: dict[str, Any]) -> None:
    assert outcome["ops"]["rms_norm"] == "example_sloth_plugin"
    assert outcome["ops"]["rope"].startswith("sloth_kernels")
    assert outcome["calls"] == outcome["norms"] == 5
    assert outcome["distance"] < 1e-5


def test_is_taken_back_by_undo(outcome: dict[str, Any]) -> None:
    assert outcome["mark"] == "was here"
    assert outcome["undone"]


def test_can_be_disabled(site: Path) -> None:
    script = "from sloth_backend.manager import get_manager; print(*get_manager().names())"
    names = run(script, site, SLOTH_DISABLE="example").stdout.split()
    assert "kernel_patching" in names
    assert "example" not in names


def test_broken_import_is_named(tmp_path: Path) -> None:
    broken = install(tmp_path, "import a_module_that_is_not_there\n")
    script = "from sloth_backend.manager import get_manager; print(*get_manager().names())"
    done = run(script, broken)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "SlothPluginError: plugin 'example' (example_sloth_plugin) cannot be imported" in last
    assert "a_module_that_is_not_there" in last
    assert "SLOTH_DISABLE=example" in last
