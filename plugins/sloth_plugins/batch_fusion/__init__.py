"""Batch fusion: the micro-batches of an accumulation step pass together, without padding.

``documents`` keeps rows apart that are laid end to end, ``rows`` takes batches apart and lays them, ``laid`` is a step
of them, ``budget`` says how many passes pay, ``fusion`` puts them into the trainer's loop, ``ahead`` fetches the next
step's while the device is busy, ``means`` weighs micro-batches as the host does, ``obstacles`` are the reasons not to,
``next_tokens`` and ``overrides`` some of them. docs/batch-fusion.md tells the whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_backend import ranks
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
    if not ranks.everywhere(reason is None):
        reason = reason or "another process of the run cannot"
    if reason is not None:
        return [Finding("skipped", "micro-batches", reason, CAPABILITY)]
    apart = not trainer.model_accepts_loss_kwargs and _trains_head(model)
    budget = Budget(planner_of(model), autocast_of(trainer))
    Fusion(trainer, budget, longest_document(model.config), apart).install(model, edits)
    if apart:
        words = (
            "each micro-batch passes without padding; several would hold a gradient of the head each, since the host "
            "takes the mean of each"
        )
        return [Finding("changed", "micro-batches", words, CAPABILITY)]
    words = (
        "the rows of an accumulation step pass together, without padding, in as few passes as the memory plan allows"
    )
    return [Finding("changed", "micro-batches", words, CAPABILITY)]


def _trains_head(model: Any) -> bool:
    return any(p.requires_grad for p in model.get_output_embeddings().parameters())
