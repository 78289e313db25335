"""Which decoder layers run as programs: ``layer_programs`` marks them, and other plugins leave them to it."""

from __future__ import annotations

from torch import nn

from sloth_backend.findings import Edits

MARK = "_sloth_program"
"""Instance attribute of a layer that runs as a program."""


def mark(layer: nn.Module, edits: Edits) -> None:
    """Note that ``layer`` runs as a program."""
    edits.set(layer, MARK, True)


def runs_program(layer: nn.Module) -> bool:
    """Whether ``layer`` runs as a program."""
    return MARK in vars(layer)


def program_layers(model: nn.Module) -> set[nn.Module]:
    """The layers of ``model`` that run as programs."""
    return {module for module in model.modules() if runs_program(module)}
