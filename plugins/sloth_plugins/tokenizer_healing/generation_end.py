"""Fault: generation runs on after the answer, because ``generation_config`` does not know the token that ends it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_backend.findings import Finding
from sloth_backend.phases import base_model
from sloth_plugins.tokenizer_healing.case import Case, finding, show
from sloth_plugins.tokenizer_healing.chat_template import turn_end
from sloth_plugins.tokenizer_healing.model_ids import embedding_rows

SUBJECT = "model.generation_config.eos_token_id"


def heal(case: Case, model: nn.Module) -> list[Finding]:
    """Let generation end where the chat template ends an answer, and at eos; drop ids that the model cannot give."""
    target: Any = base_model(model)
    config = getattr(target, "generation_config", None)
    if config is None:
        return []
    before = config.eos_token_id
    listed = [before] if isinstance(before, int) else list(before or [])
    rows = embedding_rows(target)
    possible = [number for number in listed if rows is None or 0 <= number < rows]
    wanted = {number: why for number, why in _ends(case) if rows is None or number < rows}
    missing = [number for number in wanted if number not in possible]
    after = [*missing, *possible]
    if after == listed or not after:
        return []
    case.edits.set(config, "eos_token_id", after[0] if len(after) == 1 else after)
    reasons = [wanted[number] for number in missing]
    reasons += [f"{number} is beyond the embedding's {rows} rows" for number in listed if number not in possible]
    return [finding("changed", SUBJECT, f"was {before}; now {config.eos_token_id}: {', and '.join(reasons)}")]


def _ends(case: Case) -> list[tuple[int, str]]:
    """The ids that have to end generation, and why."""
    eos, turn = case.named("eos_token"), turn_end(case)
    ends = [(turn, "the chat template ends an answer with"), (eos, "the tokenizer's eos is")]
    return [
        (number, f"{why} {show(token, number)}") for token, why in ends if (number := case.id_of(token)) is not None
    ]
