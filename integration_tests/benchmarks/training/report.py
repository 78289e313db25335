"""The file of results as a page: DIR/training.json -> DIR/training.md and its pictures.

usage: python -m integration_tests.benchmarks.training.report DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from integration_tests.benchmarks.training import judge, plots, results
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.results import Figures, Suite
from integration_tests.benchmarks.training.workloads import WORKLOADS, Point, Workload

Key = tuple[str, str, Point]
PAGE = "training.md"
TRAINING = {"qlora": "NF4 base, LoRA", "lora": "bf16 base, LoRA", "full": "full fine-tuning in bf16"}


def write(folder: Path, suite: Suite) -> None:
    """Write the page and its pictures to ``folder``."""
    figures = results.figures(suite)
    verdicts = worst_verdicts(suite)
    pictures = plots.draw_all(folder, figures)
    parts = [
        ["# Training, all contenders in one run", ""],
        ["Written by `python -m integration_tests.benchmarks.training.run`. " + about(suite), ""],
        [f"![{picture.stem}]({picture.name})" for picture in pictures] + [""],
        bars_section(suite),
        *(trainer_section(WORKLOADS[name], figures, verdicts) for name in measured(figures, "trainer")),
        *(plain_section(WORKLOADS[name], figures, verdicts) for name in measured(figures, "plain")),
        version_section(suite),
    ]
    text = "\n".join(line for part in parts for line in part).rstrip()
    (folder / PAGE).write_text(text + "\n")


def about(suite: Suite) -> str:
    """Hardware, rule of the losses, and who is missing."""
    devices = sorted({result["device"] for result in suite["results"] if "device" in result})
    absent = "".join(f" {CONTENDERS[name].title}: {why}." for name, why in suite["absent"].items())
    return (
        f"Hardware: {', '.join(devices) or 'none'}. Medians over rounds; memory is the peak of what tensors hold. "
        "Losses are compared with stock's step by step (`judge.py` states the rule): a contender marked *differs* "
        f"trains something else, whatever its speed.{absent}"
    )


def measured(figures: dict[Key, Figures], loop: str) -> list[str]:
    """The workloads of a kind of loop that have results, in the order of ``WORKLOADS``."""
    return [name for name, w in WORKLOADS.items() if w.loop == loop and any(key[0] == name for key in figures)]


def worst_verdicts(suite: Suite) -> dict[Key, str]:
    """What is said of the losses of a contender at a point: the worst of its rounds."""
    found: dict[Key, str] = {}
    order = ("equal", "unjudged", "oom", "timeout", "error", "differs")
    for verdict in judge.judge_losses(suite):
        name = (verdict.workload, verdict.contender, verdict.point)
        found[name] = max(found.get(name, "equal"), verdict.verdict, key=order.index)
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown, the first column to the left and the others to the right."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)] + [""]


def number(value: float | None, form: str) -> str:
    """A figure, or nothing."""
    return "" if value is None else format(value, form)


def describe(workload: Workload) -> str:
    """The set-up in a sentence."""
    rows = "rows of Alpaca's lengths" if workload.lengths == "alpaca" else "equal rows"
    rows += ", packed" * workload.packing
    adapters = "" if workload.training == "full" else f" of rank {workload.rank} on all linears"
    return (
        f"{workload.model}, {TRAINING[workload.training]}{adapters}, {workload.optimizer}, {rows}, "
        f"accumulation {workload.accumulation}, {workload.steps} steps of which {workload.warmup} warm up."
    )


def trainer_section(workload: Workload, figures: dict[Key, Figures], verdicts: dict[Key, str]) -> list[str]:
    """One line a contender."""
    here = [(name, f) for name in CONTENDERS for key, f in figures.items() if key[:2] == (workload.name, name)]
    batch, length = here[0][1].point
    stock = next((f.step_seconds for name, f in here if name == "stock"), None)
    rows = [
        (CONTENDERS[name].title, "losses only", *[""] * 5, verdicts[(workload.name, name, f.point)], str(f.rounds))
        if CONTENDERS[name].truth
        else (
            CONTENDERS[name].title,
            number(f.step_seconds, ".3f") or f.status,
            number(f.tokens_per_second, ",.0f"),
            f"{stock / f.step_seconds:.2f}x" if stock and f.step_seconds else "",
            number(f.peak_gib, ".2f"),
            number(f.reserved_gib, ".2f"),
            number(f.base_gib, ".2f"),
            verdicts[(workload.name, name, f.point)],
            str(f.rounds),
        )
        for name, f in here
    ]
    title = f"## {workload.name}: batch {batch} x {workload.accumulation}, up to {length:,} tokens"
    header = ("contender", "s/step", "tok/s", "of stock", "peak GiB", "reserved", "base", "losses", "rounds")
    return [title, "", describe(workload), "", *table(header, rows)]


def plain_section(workload: Workload, figures: dict[Key, Figures], verdicts: dict[Key, str]) -> list[str]:
    """One line a point, one column a contender."""
    points = sorted({key[2] for key in figures if key[0] == workload.name})
    who = [n for n, c in CONTENDERS.items() if not c.truth and any(key[:2] == (workload.name, n) for key in figures)]
    rows = []
    for point in points:
        cells = []
        for name in who:
            f = figures.get((workload.name, name, point))
            mark = " *differs*" if f and verdicts[(workload.name, name, point)] == "differs" else ""
            cells.append(_cell(f) + mark)
        rows.append((f"{point[0]} x {point[1]:,}", *cells))
    header = ("rows x tokens", *(CONTENDERS[name].title for name in who))
    note = "Seconds a step, tokens a second, peak GiB; a plain loop of forward, backward and step."
    return [f"## {workload.name}", "", f"{describe(workload)} {note}", "", *table(header, rows)]


def _cell(f: Figures | None) -> str:
    if f is None:
        return ""
    if f.status != "ok":
        return f.status
    return f"{f.step_seconds:.3f} s, {f.tokens_per_second:,.0f}, {f.peak_gib:.2f}"


def bars_section(suite: Suite) -> list[str]:
    """The bars and whether they hold."""
    words = {True: "holds", False: "**missed**", None: "not measured"}
    rows = [
        (
            f"{v.bar.workload}, {CONTENDERS[v.bar.contender].title}",
            v.bar.describe(),
            number(v.value, ".3f"),
            number(v.limit, ".3f"),
            words[v.holds],
        )
        for v in judge.judge_bars(suite)
    ]
    return ["## Bars", "", *table(("workload", "bar", "measured", "at most", ""), rows)]


def version_section(suite: Suite) -> list[str]:
    """What took part, by contender."""
    rows = []
    for name, contender in CONTENDERS.items():
        found = [r["versions"] for r in suite["results"] if r["contender"] == name and "versions" in r]
        if found:
            rows.append((contender.title, ", ".join(f"{package} {version}" for package, version in found[-1].items())))
    return ["## Versions", "", *table(("contender", "versions"), rows)]


def main() -> None:
    """Report on a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder, results.load(folder))


if __name__ == "__main__":
    main()
