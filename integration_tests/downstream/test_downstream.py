"""The plugin and its runner on suites of a few lines: what is switched on is counted, and nothing passes for it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from integration_tests import child
from integration_tests.docs.snippets import blocks
from integration_tests.downstream import run as runner
from integration_tests.downstream.plugin import summary
from integration_tests.downstream.suites import Suite

LLAMA = """
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

def make():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
"""
PREPARES = """
def test_prepares():
    model = Accelerator(cpu=True).prepare(make())
    ids = torch.randint(0, 64, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
"""
BARE = """
from peft import LoraConfig, get_peft_model

def test_bare():
    model = get_peft_model(make(), LoraConfig(target_modules=["q_proj"]))
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
"""
NOTHING = """
import torch
from accelerate import Accelerator

def test_nothing():
    assert Accelerator(cpu=True).prepare(torch.nn.Linear(2, 2)).in_features == 2
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point that switches hosts is this repository's in the processes that a test starts."""
    folders = [tmp_path / name for name in ("metadata", "lean")]
    for folder in folders:
        folder.mkdir()
    environment = child.without_optional(child.environment(folders[0]), folders[1])
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # without it no stand-ins are written


def outcome(tmp_path: Path, mode: str, body: str, jobs: int = 0, **facts: Any) -> tuple[dict[str, Any], list[str]]:
    """What the runner finds for a suite of one file: the outcomes by mode, and the problems."""
    tests = tmp_path / "source" / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    (tests / "test_suite.py").write_text(LLAMA + body)
    suite = Suite("accelerate", "nobody/nothing", ("tests/test_suite.py",), **facts)
    options = Namespace(source=tmp_path / "source", cache=tmp_path, mode=mode, tests=None, jobs=jobs)
    options.at_once, options.limit = jobs > 0, None
    outcomes = runner.run_suite(suite, options)
    return outcomes, runner.judge(suite, outcomes)


def test_modes(tmp_path: Path) -> None:
    outcomes, problems = outcome(tmp_path, "compare", PREPARES + BARE, bare=True)
    assert problems == []
    assert {mode: found["counts"] for mode, found in outcomes.items()} == {
        mode: {"passed": 2} for mode in ("stock", "installed", "on")
    }
    assert {mode: found["switched_on"] for mode, found in outcomes.items()} == {"stock": 0, "installed": 0, "on": 2}
    on = outcomes["on"]
    assert on["models"] == {"LlamaForCausalLM": 2}
    assert on["hosts"] == {"accelerate": 1, "user": 1}
    assert on["changed"]["layer_program"] == 2


GROUPS = """
import os
import torch.distributed as dist
from torch.distributed import init_process_group

def test_a_group_is_left_behind():
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
    init_process_group("gloo", world_size=1, rank=0)

def test_it_is_gone():
    assert not dist.is_initialized()
"""


def test_modes_beside_each_other_in_several_processes(tmp_path: Path) -> None:
    outcomes, problems = outcome(tmp_path, "compare", PREPARES + GROUPS, jobs=1)
    assert problems == []
    assert [found["counts"] for found in outcomes.values()] == [{"passed": 3}] * 3
    assert outcomes["on"]["models"] == {"LlamaForCausalLM": 1}


BEGINS = """
def test_begins():
    import sloth_backend
    sloth_backend.optimize(make(), config={"print_report": False})
"""


def alive(process: int) -> bool:
    """Whether it runs; one that nobody waits for does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


def test_a_suite_that_takes_too_long_is_interrupted(tmp_path: Path) -> None:
    """With all that it started; what it writes then is there."""
    found, ready = tmp_path / "found", tmp_path / "ready"
    script = f"""
import pathlib, subprocess, time
other = subprocess.Popen(["sleep", "600"])
try:
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path({str(found)!r}).write_text(str(other.pid))
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    while not ready.exists():
        time.sleep(0.05)
    assert not child.ended(process, 0.1, signal.SIGINT)
    other = int(found.read_text())
    for _ in range(100):
        if not alive(other):
            break
        time.sleep(0.05)
    assert not alive(other)
    assert child.ended(subprocess.Popen([sys.executable, "-c", ""], start_new_session=True), None)


def test_who_interrupts_the_runner_ends_the_tests() -> None:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.ended(process, None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_session_that_nobody_asked_for_is_a_problem(tmp_path: Path, jobs: int) -> None:
    _, problems = outcome(tmp_path, "installed", BEGINS, jobs=jobs)
    assert problems == ["installed: a session was begun although nobody asked"]


def test_a_run_in_which_nothing_is_switched_on_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_suite.py").write_text(NOTHING)
    monkeypatch.setitem(runner.SUITES, "fake", Suite("accelerate", "nobody/nothing", ("tests/test_suite.py",)))
    written = tmp_path / "out.json"
    arguments = ["fake", "--mode", "on", "--source", str(tmp_path), "--json", str(written)]
    assert runner.main(arguments) == 1
    found = json.loads(written.read_text())["fake"]
    assert found["problems"] == ["on: nothing was changed on any model (0 switched on)"]
    assert found["counts"] == {"on": {"passed": 1}}
    assert found["left_alone"] == {"Linear": 1}


def test_the_documented_commands_are_understood() -> None:
    """What make hands on as ARGS, and what is said without make."""
    page = next(block for block in blocks("docs/downstream.md") if block.language == "bash")
    for line in page.commands:
        words = shlex.split(line)
        arguments = shlex.split(words[-1].removeprefix("ARGS=")) if words[0] == "make" else words[3:]
        options = runner._parser().parse_args([] if arguments == ["downstream"] else arguments)
        assert set(options.suites) <= runner.SUITES.keys(), line


def test_failures_are_told_apart() -> None:
    ends = {"tests/a.py::t[1]": "failed", "tests/a.py::u": "failed", "tests/a.py::v": "failed"}
    stock = {"tests": dict.fromkeys(ends, "passed") | {"tests/a.py::v": "failed"}, "problems": [], "mode": "stock"}
    facts = {"problems": [], "switched_on": 1, "with_changes": 1, "left_alone": {}, "reasons": {}}
    on = {"mode": "on", "tests": {**ends, "tests/a.py::w": "passed"}, **facts}
    suite = Suite("accelerate", "nobody/nothing", (), refused={"*::t[[]1[]]": "refused"})
    assert runner.judge(suite, {"stock": stock, "on": on}) == ["on: tests/a.py::u: "]
    assert runner.judge(suite, {"on": on}) == ["on: tests/a.py::u: ", "on: tests/a.py::v: "]


def test_summary() -> None:
    lines = [
        {"event": "switched on", "model": "A", "test": "t", "host": "trl", "changed": {"glu": 2}},
        {"event": "switched on", "model": "A", "test": "u", "host": "trl", "changed": {}},
        {"event": "left alone", "model": "B", "test": "u", "host": "accelerate"},
    ]
    found = summary(lines)
    assert (found["switched_on"], found["with_changes"], found["tests_switched_on"]) == (2, 1, 2)
    assert (found["models"], found["changed"], found["left_alone"]) == ({"A": 2}, {"glu": 2}, {"B": 1})
