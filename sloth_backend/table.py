"""The Report as a table for people."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from sloth_backend.findings import Report, summarize

STYLE = {"changed": "green", "skipped": "yellow", "warned": "red"}


def table(report: Report) -> Table:
    """A rich table: one row for findings that differ only in the module they are about."""
    counts = Counter(f.action for f in report.findings)
    title = f"sloth_backend · {report.run} · " + ", ".join(f"{n} {action}" for action, n in counts.items())
    result = Table(title=title, title_justify="left", header_style="bold", show_lines=False)
    for name in ("what", "outcome", "where", "detail"):
        result.add_column(name, overflow="fold")
    for finding, count in summarize(report.findings):
        where = finding.subject if count == 1 else f"{count} × {_pattern(finding.subject)}"
        style = STYLE[finding.action]
        result.add_row(finding.capability or finding.plugin, f"[{style}]{finding.action}[/]", where, finding.reason)
    return result


def render(report: Report, width: int = 120) -> str:
    """The table as plain text of ``width`` columns."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table(report))
    return capture.get()


def _pattern(subject: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in subject.split("."))
