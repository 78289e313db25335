"""``sloth demo`` from its options to the files it leaves: one run, or the same run with and without the backend."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sloth_backend.demo import data, show
from sloth_backend.demo.data import DemoError
from sloth_backend.demo.outcome import Outcome, Settings, max_difference

NEEDED = ("trl", "datasets", "matplotlib")


def demo(settings: Settings, out: Path, compare: bool, console: Console) -> None:
    """Train, show what came out, and write ``loss.png``, ``metrics.json`` and ``model/`` under ``out``.

    Raises:
        DemoError: the run cannot be made as asked.
    """
    _check(settings, out)
    both = [settings, replace(settings, backend=False)]
    outcomes = [_run_apart(one, out) for one in both] if compare else [_run(settings, out, console)]
    show.outcome(outcomes[0], console)
    if compare:
        show.comparison(outcomes[0], outcomes[1], console)
    written = _write(outcomes, out)
    show.facts({"wrote": ", ".join(map(str, written))}, console)


def _check(settings: Settings, out: Path) -> None:
    """What can be found wrong before the slow imports."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed; pip install 'sloth-backend[demo]' brings what is needed")
    if settings.data is not None:
        data.load(settings.data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: cannot make this folder: {error.strerror}") from None


def _run(settings: Settings, out: Path, console: Console) -> Outcome:
    with console.status("loading PyTorch, transformers and TRL"):
        from sloth_backend.demo.train import run
    return run(settings, console, out / "model" if settings.backend else None)


def _run_in_process(settings: Settings, out: Path) -> Outcome:
    console = Console()
    console.rule(settings.name)
    return _run(settings, out, console)


def _run_apart(settings: Settings, out: Path) -> Outcome:
    """The run in a process of its own, so that two runs share neither memory nor caches."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_run_in_process, settings, out).result()
        except BrokenProcessPool:
            raise DemoError(f"the run on {settings.name} was killed; did the machine run out of memory?") from None


def _write(outcomes: list[Outcome], out: Path) -> list[Path]:
    from sloth_backend.demo.plot import draw

    picture, metrics = out / "loss.png", out / "metrics.json"
    draw(outcomes, picture)
    content: dict[str, object] = {"runs": [outcome.to_dict() for outcome in outcomes]}
    if len(outcomes) == 2:
        content["max_loss_difference"] = max_difference(*outcomes)
    metrics.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [picture, metrics, out / "model"]
