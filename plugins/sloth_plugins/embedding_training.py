"""Embeddings that train: a learning rate of their own, and what a merge would make of tied ones.

PEFT trains whole copies of a matrix (``modules_to_save``), some of its rows (``trainable_token_indices``) or low-rank
factors. All of them train, save and load as they are. Where input and output embeddings are one matrix, a merge writes
into that one matrix: what only one of the two has learned then changes both, and the merged model is not the one that
was trained. There is nothing to mend about it here, so it is said before the first step.
"""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

from torch import nn

from sloth_backend.embedding_rate import CAPABILITY, embedding_parameters, rate_finding, split_groups
from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.phases import base_model
from sloth_backend.run import Run, find_embedding

METHOD = "create_optimizer"


@hookimpl
def sloth_patch_model(model: nn.Module) -> list[Finding]:
    """Say where a merge would change what was trained."""
    reason = merge_hazard(model)
    return [Finding("warned", "embeddings", reason, CAPABILITY)] if reason else []


@hookimpl
def sloth_patch_trainer(trainer: Any, model: nn.Module, run: Run, edits: Edits) -> list[Finding]:
    """Give the embeddings their learning rate, in the optimizer that the trainer has or will make."""
    rate = run.config.embedding_learning_rate
    if rate is None:
        return []
    parameters = embedding_parameters(model)
    if trainer.optimizer is not None or not parameters:
        schedulers = [trainer.lr_scheduler] if trainer.lr_scheduler is not None else []
        edits.on_undo(split_groups(trainer.optimizer, parameters, rate, schedulers))
    else:
        _split_when_made(trainer, rate, edits)
    return [rate_finding(parameters, rate)]


def _split_when_made(trainer: Any, rate: float, edits: Edits) -> None:
    before = vars(trainer).get(METHOD)
    original = before.__func__ if isinstance(before, types.MethodType) else type(trainer).create_optimizer

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        split_groups(optimizer, embedding_parameters(base_model(self.model)), rate)
        return optimizer

    setattr(trainer, METHOD, types.MethodType(create_optimizer, trainer))
    # The model remembers its edits; it must not keep the trainer alive.
    edits.on_undo(functools.partial(_take_back, weakref.ref(trainer), before and before.__func__))


def _take_back(trainer: weakref.ref[Any], before: Any) -> None:
    if (alive := trainer()) is not None:
        vars(alive).pop(METHOD, None)
        if before is not None:
            setattr(alive, METHOD, types.MethodType(before, alive))


def merge_hazard(model: Any) -> str | None:
    """Why ``merge_and_unload`` would not give the model that was trained, or None."""
    first, last = find_embedding(model, "input"), find_embedding(model, "output")
    if first is None or last is None or _matrix(first) is not _matrix(last):
        return None
    advice = "merged, the model is not the one that was trained: keep the adapter apart from it, or"
    if _has_lora(first) or _has_lora(last):
        return (
            "LoRA on one of two tied embeddings is merged into the one matrix that both are: "
            f"{advice} train them with modules_to_save and ensure_weight_tying=True"
        )
    if _rows_of(first) is not _rows_of(last):
        return (
            "the tied embeddings train rows of their own each (trainable_token_indices), which are merged into the one "
            f"matrix that both are: {advice} name the same rows for both"
        )
    return None


def _matrix(module: Any) -> Any:
    """The parameter at the bottom of adapter wrappers; a trained copy is no longer tied."""
    copies = getattr(module, "modules_to_save", None)
    if copies:
        return next(iter(copies.values())).weight
    while hasattr(module, "token_adapter") or hasattr(module, "base_layer"):
        module = module.token_adapter if hasattr(module, "token_adapter") else module.base_layer
    return getattr(module, "weight", None)


def _has_lora(module: nn.Module) -> bool:
    return any("lora_" in name for name, _ in module.named_parameters())


def _rows_of(module: Any) -> Any:
    """What holds the rows that train by themselves, one object for tied ones; None where none do."""
    adapter = getattr(module, "token_adapter", None)
    return None if adapter is None else adapter.trainable_tokens_delta
