"""Tokenizer healing: find the faults that spoil a run without a word, and mend those that can be mended safely.

Phase A takes the faults of the tokenizer itself, before the host tokenises; phase B those that show only once the model
is there. The vocabulary is never grown or renumbered, and the Python object stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.run import Run
from sloth_plugins.tokenizer_healing import (
    added_tokens,
    chat_template,
    dangling,
    doubled,
    generation_end,
    model_ids,
    pad_token,
    padding_side,
    ranked_truth,
    round_trip,
    special_tokens,
    truth,
)
from sloth_plugins.tokenizer_healing.case import Case, finding
from sloth_plugins.tokenizer_healing.ranked_file import NotRanked
from sloth_plugins.tokenizer_healing.spm_file import NotSentencePiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAULTS: tuple[Callable[[Case], list[Finding]], ...] = (
    truth.heal,  # first: what follows encodes
    ranked_truth.heal,
    special_tokens.heal,
    pad_token.heal,  # pad must differ from bos and eos, so after those
    added_tokens.check,
    chat_template.heal,
    doubled.heal,
    round_trip.heal,  # last: what was mended must survive a save
)
"""The faults of a tokenizer, in the order in which they are looked for."""


@hookimpl
def sloth_heal_tokenizer(tokenizer: PreTrainedTokenizerBase, run: Run, edits: Edits) -> list[Finding] | None:
    """Phase A: every fault in turn, each on what the one before has left."""
    if not run.config.heal_tokenizer:
        return None
    reason = unfit(tokenizer)
    if reason:
        return [finding("skipped", "tokenizer", reason)]
    case = Case(tokenizer, edits)  # pyright: ignore[reportArgumentType]
    found = []
    try:
        case.truth = truth.load(tokenizer)
        case.ranked = ranked_truth.load(tokenizer) if case.truth is None else None
    except (NotSentencePiece, NotRanked) as error:
        found.append(finding("warned", truth.SUBJECT, f"not compared with its origin: {error}"))
    return found + [one for heal in FAULTS for one in heal(case)]


@hookimpl
def sloth_fix_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run, edits: Edits
) -> list[Finding] | None:
    """Phase B: ids that the model does not have, and what it has to know of the tokenizer."""
    if tokenizer is None or not run.config.heal_tokenizer or unfit(tokenizer):
        return None
    case = Case(tokenizer, edits)  # pyright: ignore[reportArgumentType]
    found = dangling.heal(case, model) + model_ids.heal(case, model)  # what is gone needs no row
    return found + generation_end.heal(case, model) + padding_side.heal(case, model, run)


def unfit(tokenizer: object) -> str | None:
    """Why a tokenizer is left alone: healing knows transformers' fast tokenizers only."""
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

    if isinstance(tokenizer, ProcessorMixin):
        return "left alone: a processor of several modalities; pass its tokenizer to have that healed"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return f"left alone: {type(tokenizer).__name__} has no tokenizers backend"
    if type(tokenizer).__module__.startswith("transformers_modules."):
        return f"left alone: {type(tokenizer).__name__} is code from the model's repository"
    return None
