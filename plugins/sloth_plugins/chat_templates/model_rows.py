"""The model's side of new tokens: rows in its embeddings where there are none, and the id that ends generation.

A new row gets the mean of the trained ones (``embedding_fix``), which puts a new token where the model expects an
average one. A random row would start with a logit above or below all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sloth_backend.config import SlothConfigError
from sloth_backend.findings import Edits, Finding
from sloth_backend.phases import base_model
from sloth_plugins.embedding_fix import find_matrices, fix, obstacle
from sloth_plugins.tokenizer_healing.model_ids import embedding_rows

CAPABILITY = "chat_templates"
MULTIPLE = 64
"""Matrices of a multiple of this many rows stay so: the head's product is much slower without."""


def check(model: nn.Module, rows_needed: int) -> None:
    """Refuse what cannot be given rows, before anything is changed.

    Raises:
        SlothConfigError: rows are missing, and the model carries adapters or its embeddings cannot be written.
    """
    rows = embedding_rows(base_model(model))
    if rows is None or rows >= rows_needed:
        return
    advice = "call get_chat_template(..., model=model) on the bare model, before adapters and before sharding"
    if hasattr(model, "get_base_model"):
        raise SlothConfigError([f"the model needs {rows_needed} rows, has {rows}, and carries adapters: {advice}"])
    for matrix in find_matrices(model):
        reason = obstacle(matrix.weight)
        if reason:
            problem = f"{matrix.subject} needs {rows_needed} rows and has {len(matrix.weight)}, but {reason}"
            raise SlothConfigError([f"{problem}: {advice}"])


def make_room(model: nn.Module, rows_needed: int, new_ids: list[int], threshold: float) -> list[Finding]:
    """Resize the embeddings if ids have no row, and set the rows of new tokens, and untrained rows, to the mean.

    Args:
        model: a causal language model, changed in place.
        rows_needed: the highest id of the tokenizer plus one.
        new_ids: ids that the tokenizer did not have before.
        threshold: a row is untrained when no entry is larger in magnitude.
    """
    target: Any = base_model(model)
    rows = embedding_rows(target)
    if rows is None:
        return [Finding("skipped", "embeddings", "the model names no input embeddings", CAPABILITY)]
    fresh, found = set(new_ids), []
    if rows < rows_needed:
        size = -(-rows_needed // MULTIPLE) * MULTIPLE if rows % MULTIPLE == 0 else rows_needed
        target.resize_token_embeddings(size, mean_resizing=False)
        fresh |= set(range(rows, size))
        reason = f"resized from {rows} to {size} rows: the tokenizer's ids go up to {rows_needed - 1}"
        found = [Finding("changed", "embeddings", reason, CAPABILITY)]
    return found + [_fill(matrix, sorted(fresh), threshold) for matrix in find_matrices(target)]


@torch.no_grad()
def _fill(matrix: Any, fresh: list[int], threshold: float) -> Finding:
    """Rows of new tokens count as untrained: zeroed first, so that they have no part in the mean."""
    if obstacle(matrix.weight) is None:
        matrix.weight.data[fresh] = 0
    return fix(matrix, threshold, Edits())


def end_generation(model: nn.Module, stop: int, eos: int | None, edits: Edits) -> list[Finding]:
    """Have generation stop at the end of a turn, and at eos as before.

    Args:
        model: a causal language model.
        stop: the id that ends a turn.
        eos: the tokenizer's.
        edits: takes what was there.
    """
    config = getattr(base_model(model), "generation_config", None)
    if config is None:
        return []
    before = config.eos_token_id
    ends = [before] if isinstance(before, int) else list(before or [])
    if stop in ends:
        return []
    after = [stop, *ends] if ends else [stop] if eos in (None, stop) else [stop, eos]
    edits.set(config, "eos_token_id", after[0] if len(after) == 1 else after)
    reason = f"was {before}; now {config.eos_token_id}: the chat template ends turns with {stop}"
    return [Finding("changed", "model.generation_config.eos_token_id", reason, CAPABILITY)]
