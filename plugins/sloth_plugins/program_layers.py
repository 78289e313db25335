"""What ``layer_programs`` tells other plugins: which decoder layers run as programs, and what a pass costs."""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_backend.findings import Edits

MARK = "_sloth_program"
"""Instance attribute of a layer that runs as a program."""
PLANNER = "_sloth_planner"
"""Instance attribute of a model whose passes are planned."""
LIVE = "_sloth_linear"
"""Instance attribute of a module outside of programs that computes with a LiveLinear."""


def mark(layer: nn.Module, edits: Edits) -> None:
    """Note that ``layer`` runs as a program."""
    edits.set(layer, MARK, True)


def runs_program(layer: nn.Module) -> bool:
    """Whether ``layer`` runs as a program."""
    return MARK in vars(layer)


def program_layers(model: nn.Module) -> set[nn.Module]:
    """The layers of ``model`` that run as programs."""
    return {module for module in model.modules() if runs_program(module)}


def set_planner(model: nn.Module, planner: object, edits: Edits) -> None:
    """Note who plans the passes of ``model``."""
    edits.set(model, PLANNER, planner)


def planner_of(model: nn.Module) -> Any:
    """Who plans the passes of ``model``; None where nobody does."""
    return vars(model).get(PLANNER)


def forget_weights(model: nn.Module) -> None:
    """Keep no parameter of ``model`` until its next pass; whoever patches it, or runs it to see how it works, ends so.

    The host may be about to shard it, and what is kept here would stay whole beside the shards.
    """
    planner = planner_of(model)
    if planner is not None:
        planner.forget()
    for module in model.modules():
        if LIVE in vars(module):
            vars(module)[LIVE].forget()
