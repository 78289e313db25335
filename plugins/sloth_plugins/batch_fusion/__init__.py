"""Batch fusion: the micro-batches of an accumulation step pass together, without padding.

``documents`` keeps rows apart that are laid end to end, ``rows`` takes batches apart and lays them, ``budget`` says how
many passes pay, ``fusion`` puts them into the trainer's loop, ``obstacles`` are the reasons not to.
docs/batch-fusion.md tells the whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.run import Run
from sloth_plugins.batch_fusion.budget import Budget, autocast_of
from sloth_plugins.batch_fusion.documents import keep_apart, longest_document
from sloth_plugins.batch_fusion.fusion import Fusion
from sloth_plugins.batch_fusion.obstacles import obstacle
from sloth_plugins.program_layers import planner_of

CAPABILITY = "batch_fusion"


@hookimpl
def sloth_patch_model(model: nn.Module, run: Run, edits: Edits) -> list[Finding]:
    """Keep rows apart that a pass lays end to end, be it the host or this plugin that lays them."""
    return [keep_apart(model, edits)]


@hookimpl
def sloth_patch_trainer(trainer: Any, model: nn.Module, run: Run, edits: Edits) -> list[Finding]:
    """Let the micro-batches of a step pass together."""
    reason = obstacle(trainer, model, run)
    if reason is not None:
        return [Finding("skipped", "micro-batches", reason, CAPABILITY)]
    Fusion(trainer, Budget(planner_of(model), autocast_of(trainer)), longest_document(model.config)).install(edits)
    words = (
        "the rows of an accumulation step pass together, without padding, in as few passes as the memory plan allows"
    )
    return [Finding("changed", "micro-batches", words, CAPABILITY)]
