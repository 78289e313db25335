"""Faults that show once the model is there: ids beyond its embedding, and a pad id that it does not share."""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_backend.findings import Finding
from sloth_backend.phases import base_model
from sloth_backend.run import find_embedding
from sloth_plugins.tokenizer_healing import pad_token
from sloth_plugins.tokenizer_healing.case import Case, finding

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def heal(case: Case, model: nn.Module) -> list[Finding]:
    """Report tokens that have no row, and tell the configs the id of pad."""
    target = base_model(model)
    rows = embedding_rows(target)
    return [*(_beyond(case, rows) if rows and case.highest >= rows else []), *_pad_id(case, target)]


def embedding_rows(model: nn.Module) -> int | None:
    """How many rows the input embedding has inside any wrapper, None where it is no ``nn.Embedding``."""
    return next((embedding.num_embeddings for embedding in _embeddings(model)), None)


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The input embedding inside any wrapper, and the copy of it that an adapter trains."""
    wrapper = find_embedding(model, "input")
    inside = wrapper.modules() if isinstance(wrapper, nn.Module) else ()
    return [module for module in inside if isinstance(module, nn.Embedding)]


def _beyond(case: Case, rows: int) -> list[Finding]:
    beyond = {token: number for token, number in case.vocab.items() if number >= rows}
    if not beyond:
        return []
    named = [f"{role} {token!r}" for role in ROLES if (token := case.named(role)) in beyond]
    examples = ", ".join(named or [repr(token) for token in sorted(beyond, key=beyond.__getitem__)[:3]])
    highest = max(beyond.values())
    reason = f"{len(beyond)} tokens ({examples}...) have ids up to {highest}, the embedding has {rows} rows"
    advice = f"call model.resize_token_embeddings({highest + 1}), or a text that uses them ends the run"
    return [finding("warned", "tokenizer.vocab", f"{reason}; {advice}")]


def _pad_id(case: Case, model: Any) -> list[Finding]:
    """``config`` and ``generation_config`` learn the tokenizer's pad id; generation would take eos instead."""
    pad = case.id_of(case.named("pad_token"))
    if pad is None or pad_token.fault(case):
        return []
    found = []
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        before = getattr(config, "pad_token_id", None)
        if config is None or before == pad:
            continue
        case.edits.set(config, "pad_token_id", pad)
        found.append(
            finding("changed", f"model.{name}.pad_token_id", f"was {before}; now {pad}, as the tokenizer has it")
        )
    return [*found, *_padding_row(case, model, pad)]


def _padding_row(case: Case, model: Any, pad: int) -> list[Finding]:
    """The row that trains nothing moves with pad: another token's would never learn."""
    found = []
    for embedding in _embeddings(model):
        before = embedding.padding_idx
        if before is not None and before != pad and pad < embedding.num_embeddings:
            case.edits.set(embedding, "padding_idx", pad)
            reason = f"was {before}, whose row would get no gradient; now {pad}, as the tokenizer has it"
            found.append(finding("changed", "input embedding's padding_idx", reason))
    return found
