"""The ``sloth`` command. Each subcommand reads its options here and does its work in a module of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import sloth_backend

app = typer.Typer(
    help="Fast, small and correct fine-tuning inside TRL.", no_args_is_help=True, pretty_exceptions_show_locals=False
)


def _console(stderr: bool = False) -> Console:
    """As wide as COLUMNS says: rich holds the ``os.environ`` of its import, which datasets replaces when it maps."""
    return Console(stderr=stderr, _environ=os.environ)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sloth-backend {sloth_backend.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fast, small and correct fine-tuning inside TRL."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a causal language model; default: a small new one.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="jsonl file (Alpaca, messages or ShareGPT); default: Python's own docstrings."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: what suits the model.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for loss.png, metrics.json and the trained model.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    lora: Annotated[
        bool | None, typer.Option("--lora/--full", help="Adapters or all weights; default: adapters with --model.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Do the same run on stock TRL too.")] = False,
) -> None:
    """Fine-tune through TRL with backend="sloth", show the loss and an answer; needs no download."""
    from sloth_backend.demo.data import DemoError
    from sloth_backend.demo.main import demo as run
    from sloth_backend.demo.outcome import Settings

    try:
        run(Settings(model=model, data=data, steps=steps, seed=seed, lora=lora), out, compare, _console())
    except DemoError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """Say what this machine and these versions can do, what is active, and why anything is not."""
    from sloth_backend.doctor import examine, render

    diagnosis = examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        render(diagnosis, _console())
    raise typer.Exit(0 if diagnosis.usable else 1)


@app.command()
def heal(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a model with its tokenizer.")],
    write: Annotated[
        Path | None, typer.Option(help="New folder for a mended copy; the model's own is never written to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the faults of a model's tokenizer and embeddings, with what is there and what should be; mend a copy."""
    from sloth_backend import heal as healing
    from sloth_backend.table import table

    try:
        patient = healing.examine(model)
        if write is not None:
            healing.write(patient, write)
    except healing.HealError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    report = patient.report
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _console().print(table(report))
    left = report.of(action="warned") + ([] if write else report.of(action="changed"))
    raise typer.Exit(1 if left else 0)


if __name__ == "__main__":
    app()
