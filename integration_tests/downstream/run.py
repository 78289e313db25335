"""Runs suites of downstream libraries without the backend, with it installed but off, and on; compares the three.

``python -m integration_tests.downstream.run SUITE... [--mode on] [--tests PATTERN] [--source DIR]``, see
docs/downstream.md. The tests are taken from the tag of the installed version, and run against the installed library.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from integration_tests import child
from integration_tests.downstream.plugin import BARE, LOG, MODE, MODES, OPTIONS, OUT
from integration_tests.downstream.standins import digest
from integration_tests.downstream.suites import SUITES, Suite

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sloth-downstream"
Outcome = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a suite has a problem, else 0."""
    options = _parser().parse_args(arguments)
    report, failed = {}, False
    for name in options.suites or _for_this_machine():
        outcomes = run_suite(SUITES[name], options)
        problems = judge(SUITES[name], outcomes)
        report[name] = {**_digest(SUITES[name], outcomes), "problems": problems}
        print(f"\n== {name}\n{json.dumps(report[name], indent=1)}")
        failed = failed or bool(problems)
    if options.json:
        merged = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**merged, **report}, indent=1) + "\n")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m integration_tests.downstream.run", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all that can run here")
    parser.add_argument("--mode", choices=[*MODES, "compare"], default="compare", help="compare runs all three")
    parser.add_argument("--tests", metavar="PATTERN", help="pytest's -k, in place of the suite's own")
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkout of the library; else it is cloned")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="for clones and stand-ins")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome, beside that of other suites")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes of pytest-xdist")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="that a mode of a suite may take")
    parser.add_argument("--at-once", action="store_true", help="the modes beside each other")
    return parser


def _for_this_machine() -> list[str]:
    import torch

    return [name for name, suite in SUITES.items() if suite.gpus <= torch.cuda.device_count()]


def run_suite(suite: Suite, options: argparse.Namespace) -> dict[str, Outcome]:
    """The outcome in each mode that is asked for."""
    source = options.source or clone(suite, options.cache)
    standins = write_standins(options.cache) if os.environ.get("HF_HUB_OFFLINE") == "1" else None
    modes = MODES if options.mode == "compare" else (options.mode,)
    with tempfile.TemporaryDirectory(prefix="sloth-downstream-") as folder:
        for mode in modes:
            stage(suite, source, Path(folder) / mode)
        with ThreadPoolExecutor(len(modes) if options.at_once else 1) as pool:
            outcomes = pool.map(lambda mode: _run(suite, mode, Path(folder), standins, options), modes)
            return dict(zip(modes, outcomes, strict=True))


def clone(suite: Suite, cache: Path) -> Path:
    """A shallow clone of the tag of the installed version; one that is there already is used again."""
    version = metadata.version(suite.library)
    folder = cache / f"{suite.library}-{version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        address = f"https://github.com/{suite.repository}"
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", address, str(folder)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{address} cannot be cloned at v{version}: give a checkout with --source DIR")
    return folder


def write_standins(cache: Path) -> Path:
    """The folder of the stand-ins, written by a process of its own in which the backend is off."""
    folder = cache / f"standins-{metadata.version('transformers')}-{digest()}"
    command = [sys.executable, "-W", "ignore", "-m", "integration_tests.downstream.standins", str(folder)]
    subprocess.run(command, env=_environment("stock"), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def stage(suite: Suite, source: Path, folder: Path) -> None:
    """Copy the tests alone, so that they import the installed library and not the one beside them."""
    for name in suite.keep:
        origin, target = source / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(origin, target) if origin.is_dir() else shutil.copy(origin, target)


def _environment(mode: str) -> dict[str, str]:
    """The environment of a process in which the backend is absent, installed, or on."""
    paths = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), MODE: mode}
    for name in ("SLOTH_BACKEND", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        variables.pop(name, None)
    if mode == "stock":
        variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if mode == "on":
        variables["SLOTH_BACKEND"] = json.dumps(OPTIONS)
    return variables


def _run(suite: Suite, mode: str, folder: Path, standins: Path | None, options: argparse.Namespace) -> Outcome:
    """One run of pytest; its outcome as the plugin wrote it."""
    out, log = folder / f"{mode}.json", folder / f"{mode}.jsonl"
    variables = {**_environment(mode), **suite.environment, OUT: str(out), LOG: str(log)}
    if suite.bare:
        variables[BARE] = "1"
    if suite.gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(suite.gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(seen.split(",")[: suite.gpus])
    if standins is not None:
        variables |= {"HF_HUB_CACHE": str(standins), "SLOTH_DOWNSTREAM_STANDINS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "integration_tests.downstream.plugin", *_pytest_options(suite)]
    command += ["-k", keyword] if (keyword := options.tests or suite.keyword) else []
    command += ["-n", str(options.jobs)] if options.jobs else []
    tests = subprocess.Popen(command, cwd=folder / mode, env=variables, start_new_session=True)
    late = not child.ended(tests, options.limit, signal.SIGINT)
    if not out.exists():
        raise SystemExit(f"pytest did not get to its end in mode {mode!r}")
    outcome = json.loads(out.read_text())
    if late:
        outcome["problems"].append(f"ended after {options.limit:g} s, with {len(outcome['tests'])} tests run")
    return outcome


def _pytest_options(suite: Suite) -> list[str]:
    quiet = ["-q", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "log_cli=0"]
    return [*quiet, *suite.files, *(f"--deselect={item}" for item in suite.deselected)]


def judge(suite: Suite, outcomes: dict[str, Outcome]) -> list[str]:
    """What is wrong with the outcome of each mode, beside what fails without the backend too."""
    stock = outcomes.get("stock", {}).get("tests")
    problems = []
    for mode, outcome in outcomes.items():
        problems += [f"{mode}: {problem}" for problem in outcome["problems"]]
        if not any(result == "passed" for result in outcome["tests"].values()):
            problems.append(f"{mode}: no test has passed")
        if mode != "stock":
            problems += [f"{mode}: {test}: {why}" for test, why in broken(suite, outcome, stock)]
    on = outcomes.get("on")
    if on is not None and suite.needs_models and not on["with_changes"]:
        problems.append(f"on: nothing was changed on any model ({on['switched_on']} switched on)")
    if on is not None and not on["switched_on"] and not on["left_alone"]:
        problems.append("on: no model came by a switch")
    return problems


def broken(suite: Suite, outcome: Outcome, stock: dict[str, str] | None) -> list[tuple[str, str]]:
    """Tests that fail, pass in ``stock``, and are not known to be refused; without ``stock``, all that fail."""
    return [
        (test, outcome["reasons"].get(test, ""))
        for test, result in outcome["tests"].items()
        if result == "failed"
        and (stock is None or stock.get(test) == "passed")
        and not (outcome["mode"] == "on" and refused(suite, test))
    ]


def refused(suite: Suite, test: str) -> str | None:
    """Why a test is known not to pass with the backend on; None where it should."""
    return next((why for pattern, why in suite.refused.items() if _matches(test, pattern)), None)


def _matches(test: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(test, pattern)


def _digest(suite: Suite, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What is worth keeping of a suite's run."""
    on, stock = outcomes.get("on"), outcomes.get("stock", {}).get("tests", {})
    digest: dict[str, Any] = {
        "library": f"{suite.library} {metadata.version(suite.library)}",
        "counts": {mode: outcome["counts"] for mode, outcome in outcomes.items()},
    }
    if stock:
        passing = [test for test, result in stock.items() if result == "passed"]
        digest["of those that pass stock"] = {
            mode: sum(outcome["tests"].get(test) == "passed" for test in passing) for mode, outcome in outcomes.items()
        }
        digest["fail stock"] = outcomes["stock"]["reasons"]
    if on is not None:
        keys = ("switched_on", "with_changes", "tests_switched_on", "models", "hosts", "changed", "left_alone")
        digest |= {key: on[key] for key in keys}
        failing = [test for test, result in on["tests"].items() if result == "failed" and stock.get(test) != "failed"]
        digest["refused"] = {test: why for test in failing if (why := refused(suite, test))}
    return digest


if __name__ == "__main__":
    sys.exit(main())
