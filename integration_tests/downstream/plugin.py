"""A pytest plugin that runs a library's own tests with the backend on, or checks that it is off.

``-p integration_tests.downstream.plugin``; ``SLOTH_DOWNSTREAM`` holds the mode:

``stock``
    the backend is not even installed; what fails here fails without us.
``installed``
    its switches are in place and nobody asks: no model may have been touched.
``on``
    every trainer and ``Accelerator.prepare`` of the tests goes through ``SLOTH_BACKEND``, which the runner sets; with
    ``SLOTH_DOWNSTREAM_BARE`` so does every model that PEFT's own functions return, through ``sloth_backend.optimize``.

Which models were switched on, and what was changed on them, is appended to the file ``SLOTH_DOWNSTREAM_LOG`` as it
happens, by forked processes too. The summary counts them; the outcome of every test goes to ``SLOTH_DOWNSTREAM_OUT``.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODES = ("stock", "installed", "on")
MODE, BARE, LOG, OUT = (f"SLOTH_DOWNSTREAM{end}" for end in ("", "_BARE", "_LOG", "_OUT"))
OPTIONS = {"print_report": False}

_RANK = {"passed": 0, "xfailed": 0, "skipped": 1, "failed": 2}
"""Of the phases of one test the worst counts."""


def pytest_configure(config: pytest.Config) -> None:
    """Switch on before any test module is imported."""
    mode = os.environ.get(MODE, "on")
    if mode not in MODES:
        raise pytest.UsageError(f"{MODE} is {mode!r}: expected one of {', '.join(MODES)}")
    config.pluginmanager.register(Outcomes(mode), "sloth-downstream-outcomes")
    if os.environ.get("SLOTH_DOWNSTREAM_STANDINS"):
        from integration_tests.downstream import standins

        standins.serve_datasets()
        standins.serve_diffusers()
        standins.train_on_cpu()
    use_free_ports()
    if mode == "on":
        watch_switches()
        if os.environ.get(BARE):
            switch_on_peft()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep helpers of the suites, which are imported by now, away from the network."""
    if os.environ.get("SLOTH_DOWNSTREAM_STANDINS"):
        from integration_tests.downstream import standins

        standins.stay_offline()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Name the running test for the records; processes that it starts inherit the name."""
    os.environ["SLOTH_DOWNSTREAM_TEST"] = item.nodeid


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A process group that a test leaves behind would make the next ones distributed."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def use_free_ports() -> None:
    """Let process groups meet at a port of their own: tests name one, and those of another mode run beside them."""
    import torch.distributed as dist

    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(*args: Any, **options: Any) -> Any:
        if options.get("world_size") == 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        return original(*args, **options)

    dist.init_process_group = init_process_group


def record(event: str, model: Any, **facts: Any) -> None:
    """Append a line to the log: an event, the class of a model, and what else there is to say."""
    path = os.environ.get(LOG)
    if path:
        line = {"event": event, "model": type(model).__name__, "test": os.environ.get("SLOTH_DOWNSTREAM_TEST"), **facts}
        with open(path, "a") as log:  # one short write, so that lines of several processes do not mix
            log.write(json.dumps(line) + "\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def watch_switches() -> None:
    """Record every model whose three phases have run, and every one that a switched-on ``prepare`` left alone."""
    from sloth_backend import phases
    from sloth_backend.hosts import accelerate

    original, needs = phases.before_train, accelerate._needs_session

    @functools.wraps(original)
    def before_train(session: Any, model: Any, *args: Any, **options: Any) -> None:
        original(session, model, *args, **options)
        changed = Counter(finding.capability for finding in session.report().of(action="changed"))
        record("switched on", phases.base_model(model), host=session.run.host, changed=dict(changed))

    @functools.wraps(needs)
    def needs_session(model: Any) -> bool:
        import torch

        wanted = needs(model)
        if not wanted and isinstance(model, torch.nn.Module) and phases.find_session(model) is None:
            record("left alone", model, host="accelerate")
        return wanted

    phases.before_train = before_train
    accelerate._needs_session = needs_session


def switch_on_peft() -> None:
    """Let what PEFT's tests get from ``get_peft_model`` and ``PeftModel.from_pretrained`` be switched on."""
    import peft
    from peft import mapping_func, peft_model

    made = peft.get_peft_model

    @functools.wraps(made)
    def get_peft_model(*args: Any, **options: Any) -> Any:
        return optimized(made(*args, **options))

    peft.get_peft_model = mapping_func.get_peft_model = get_peft_model
    loaded = peft_model.PeftModel.from_pretrained.__func__

    @functools.wraps(loaded)
    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        return optimized(loaded(cls, *args, **options))

    setattr(peft_model.PeftModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def optimized(model: Any) -> Any:
    """``model``, switched on where it is one of transformers' and is not on yet."""
    from transformers import PreTrainedModel

    import sloth_backend
    from sloth_backend import phases

    base = phases.base_model(model)
    if not isinstance(base, PreTrainedModel):
        record("left alone", base, host="user")
    elif phases.find_session(model) is None:
        sloth_backend.optimize(model, config=OPTIONS)
    return model


class Outcomes:
    """Keeps what became of each test; counts, writes and judges at the end."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.tests: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        if report.passed and report.when != "call":
            return  # a test that is interrupted has been set up, and no more
        if _RANK[outcome] >= _RANK[self.tests.get(report.nodeid, "passed")]:
            self.tests[report.nodeid] = outcome
        if report.failed:
            self.reasons[report.nodeid] = _last_line(report)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        yield
        if hasattr(session.config, "workerinput"):
            for problem in _unexpected(self.mode):
                record("problem", None, reason=problem)
        elif os.environ.get(OUT):
            Path(os.environ[OUT]).write_text(json.dumps(self.outcome(), indent=1))

    def outcome(self) -> dict[str, Any]:
        """Plain data: what the runner reads."""
        return {
            "mode": self.mode,
            "counts": dict(Counter(self.tests.values())),
            "tests": self.tests,
            "reasons": self.reasons,
            "problems": self.problems(),
            **summary(read(os.environ.get(LOG, "")) if os.environ.get(LOG) else []),
        }

    def problems(self) -> list[str]:
        """What says that the run did not test what its mode promises, in this process or in one of pytest-xdist's."""
        records = read(os.environ.get(LOG, "")) if os.environ.get(LOG) else []
        workers = [line["reason"] for line in records if line["event"] == "problem"]
        return list(dict.fromkeys([*_unexpected(self.mode), *workers]))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found = self.outcome()
        terminalreporter.section("sloth_backend downstream")
        terminalreporter.write_line(f"mode {self.mode}: {found['counts']}")
        terminalreporter.write_line(
            f"models switched on: {found['switched_on']}, with changes: {found['with_changes']}"
        )
        for key in ("models", "changed", "left_alone"):
            terminalreporter.write_line(f"  {key}: {found[key]}")
        for problem in found["problems"]:
            terminalreporter.write_line(f"PROBLEM: {problem}", red=True)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the records of a run: models, the layers and features changed on them, and those left alone."""
    on = [line for line in records if line["event"] == "switched on"]
    changed: Counter[str] = Counter()
    for line in on:
        changed.update(line["changed"])
    return {
        "switched_on": len(on),
        "with_changes": sum(bool(line["changed"]) for line in on),
        "models": dict(Counter(line["model"] for line in on).most_common()),
        "hosts": dict(Counter(line["host"] for line in on)),
        "changed": dict(changed.most_common()),
        "left_alone": dict(Counter(line["model"] for line in records if line["event"] == "left alone").most_common()),
        "tests_switched_on": len({line["test"] for line in on}),
    }


def _unexpected(mode: str) -> list[str]:
    import sys

    loaded = "sloth_backend" in sys.modules
    if mode == "stock":
        return ["sloth_backend was imported in mode 'stock'"] if loaded else []
    if not loaded:
        return [f"sloth_backend was not imported in mode {mode!r}: its entry point is not installed"]
    from sloth_backend import autoload

    status = autoload.status()
    problems = [f"{name}: {error!r}" for name, error in status.errors.items()]
    if not status.installed:
        problems.append("the post-import hook is not in place")
    if mode == "installed" and "sloth_backend.phases" in sys.modules:
        problems.append("a session was begun although nobody asked")
    return problems


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash is not None else report.longrepr).strip().splitlines()
    return (lines[0] if crash is not None and lines else lines[-1] if lines else "")[:300]
