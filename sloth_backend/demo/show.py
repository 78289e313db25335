"""What a demo run prints once it is over."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sloth_backend.demo.outcome import Outcome, max_difference


def facts(lines: dict[str, str], console: Console) -> None:
    """One line for each name and what is to be said about it."""
    for name, content in lines.items():
        console.print(Text.assemble((f"{name:<8}", "bold"), content))


def outcome(result: Outcome, console: Console) -> None:
    """Losses before and after, speed, memory, and a sample answer."""
    (_, before), (last, after) = result.held_out[0], result.held_out[-1]
    cost = f"{result.seconds_per_step:.3f} s per step, peak memory {memory(result.peak_bytes)}, {result.device}"
    facts({"loss": f"held out: {before:.3f} before, {after:.3f} after {last} steps", "cost": cost}, console)
    sample = result.sample
    text = Text()
    for name, content in (("question", sample.question), ("the data says", sample.expected)):
        text.append(f"{name}\n", style="bold").append(f"{content}\n\n")
    text.append("the model says\n", style="bold").append(sample.answer or "(nothing)", style="green")
    console.print(Panel(text, title="a held-out question", title_align="left"))


def comparison(ours: Outcome, stock: Outcome, console: Console) -> None:
    """Both runs side by side, and how far apart their losses are."""
    table = Table(header_style="bold")
    for name in ("run", "seconds per step", "peak memory", "loss before", "loss after"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for result in (ours, stock):
        losses = (f"{result.held_out[0][1]:.4f}", f"{result.held_out[-1][1]:.4f}")
        table.add_row(result.settings.name, f"{result.seconds_per_step:.4f}", memory(result.peak_bytes), *losses)
    console.print(table)
    distance = max_difference(ours, stock)
    console.print(f"Their training losses differ by at most {distance:.2e} at any of {len(ours.train)} steps.")


def memory(size: int) -> str:
    """``2.31 GiB``."""
    return f"{size / 2**30:.2f} GiB"
