"""What of a model and a tokenizer decides which rows fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sloth_backend.phases import base_model
from sloth_backend.run import find_embedding, is_causal_lm


@dataclass(frozen=True)
class ModelFacts:
    """What rows are held against.

    Attributes:
        embedding_rows: how many ids have a row in the input embedding; None where it is no ``nn.Embedding``.
        context: the positions that the model was made for; None where its configuration names none.
        learned_positions: whether each position has a row of its own, so that there are none beyond.
        ends: ids that end a text.
        shifted_labels: whether labels are next tokens, one for each id.
        tokenizer: to show what an id stands for, or None.
    """

    embedding_rows: int | None
    context: int | None
    learned_positions: bool
    ends: frozenset[int]
    shifted_labels: bool = True
    tokenizer: Any = field(default=None, repr=False)


def facts_of(model: nn.Module, tokenizer: Any) -> ModelFacts:
    """The facts of the model inside any wrapper."""
    target = base_model(model)
    embedding = _first_embedding(find_embedding(target, "input"))
    context = _context(target)
    return ModelFacts(
        embedding.num_embeddings if embedding is not None else None,
        context,
        context is not None and _has_learned_positions(target, context),
        frozenset(_ends(target, tokenizer)),
        is_causal_lm(target),
        tokenizer,
    )


def _first_embedding(module: Any) -> nn.Embedding | None:
    inside = module.modules() if isinstance(module, nn.Module) else ()
    return next((part for part in inside if isinstance(part, nn.Embedding)), None)


def _context(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if longest and factor and original:
        longest = max(longest, int(factor * original))
    return longest


def _has_learned_positions(model: nn.Module, context: int) -> bool:
    """Whether there is a matrix with one row for each position (OPT has two more)."""
    tables = (part for name, part in model.named_modules() if isinstance(part, nn.Embedding) and "pos" in name)
    named = any(0 <= table.num_embeddings - context <= 2 for table in tables)
    return named or isinstance(getattr(getattr(model, "transformer", None), "wpe", None), nn.Embedding)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    sources = (tokenizer, getattr(model, "config", None), getattr(model, "generation_config", None))
    found = [getattr(source, "eos_token_id", None) for source in sources]
    return {one for ids in found for one in (ids if isinstance(ids, (list, tuple)) else [ids]) if one is not None}
