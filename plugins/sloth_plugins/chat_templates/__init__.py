"""Chat templates: a format's template on a tokenizer, its tokens whole, without growing the vocabulary where possible.

``get_chat_template`` is what ``sloth_backend.get_chat_template`` calls. What it did is kept on the tokenizer, so that
the report of a run that trains with it says so too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sloth_backend.config import SlothConfig, SlothConfigError
from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_plugins.chat_templates import model_rows, rows
from sloth_plugins.chat_templates.applying import CAPABILITY, apply
from sloth_plugins.chat_templates.formats import find
from sloth_plugins.chat_templates.placing import place
from sloth_plugins.tokenizer_healing import truth, unfit
from sloth_plugins.tokenizer_healing.case import Case
from sloth_plugins.tokenizer_healing.spm_file import NotSentencePiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTRIBUTE = "_sloth_chat_template"
"""Instance attribute of the tokenizer under which its Applied lives; hosts may pickle it."""


@dataclass(frozen=True)
class Applied:
    """What ``get_chat_template`` did to a tokenizer.

    Attributes:
        name: the format.
        stop: the token that ends the assistant's turn.
        findings: every change, in words.
    """

    name: str
    stop: str
    findings: tuple[Finding, ...]


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    mapping: Mapping[str, str] | None = None,
    map_eos: bool = False,
    model: nn.Module | None = None,
) -> PreTrainedTokenizerBase:
    """See ``sloth_backend.get_chat_template``."""
    style, mapping = find(name), mapping or {}
    rows.check(mapping, style)
    reason = unfit(tokenizer)
    if reason:
        raise SlothConfigError([f"no chat template for this tokenizer: {reason}"])
    case, found = _open(tokenizer)
    plan = place(case, style, map_eos)
    before = set(case.vocab.values())
    if model is not None:
        model_rows.check(model, max(len(before), max(before) + 1) + len(plan.added))
    try:
        found += apply(case, style, plan, mapping, map_eos)
        stop = style.stop or str(case.named("eos_token"))
        if model is not None:
            found += _on_model(case, model, before, stop)
        elif plan.added:
            reason = f"{plan.added} have no trained rows: pass model=model, or resize the embeddings yourself"
            found.append(Finding("warned", "embeddings", reason, CAPABILITY))
        vars(tokenizer)[ATTRIBUTE] = Applied(style.name, stop, (*_earlier(tokenizer), *found))
    except BaseException:
        case.edits.rollback()
        raise
    return tokenizer


def _open(tokenizer: Any) -> tuple[Case, list[Finding]]:
    case = Case(tokenizer, Edits())
    try:
        case.truth = truth.load(tokenizer)
    except NotSentencePiece as error:
        return case, [Finding("warned", "tokenizer.vocab_file", f"not kept in step: {error}", CAPABILITY)]
    return case, []


def _earlier(tokenizer: object) -> list[Finding]:
    """What earlier calls changed and still holds."""
    known = applied(tokenizer)
    found = known.findings if known is not None else ()
    return [
        finding for finding in found if finding.subject != "tokenizer.chat_template" and finding.action == "changed"
    ]


def _on_model(case: Case, model: nn.Module, before: set[int], stop: str) -> list[Finding]:
    """Rows for the new tokens, and generation that ends where turns end."""
    fresh = [number for number in case.vocab.values() if number not in before]
    threshold = SlothConfig().untrained_threshold
    found = model_rows.make_room(model, max(case.vocab.values()) + 1, fresh, threshold)
    return found + model_rows.end_generation(model, case.vocab[stop], case.id_of(case.named("eos_token")), case.edits)


def applied(tokenizer: object) -> Applied | None:
    """What ``get_chat_template`` did to this tokenizer object; None where it was not called."""
    return getattr(tokenizer, "__dict__", {}).get(ATTRIBUTE)


@hookimpl
def sloth_heal_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Phase A: say again what was done before the run began."""
    known = applied(tokenizer)
    return None if known is None else list(known.findings)


@hookimpl(tryfirst=True)  # healing sees to the ends of all other templates
def sloth_fix_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, edits: Edits
) -> list[Finding] | None:
    """Phase B: generation stops where the template ends turns."""
    known = applied(tokenizer)
    if tokenizer is None or known is None:
        return None
    case = Case(tokenizer, edits)  # pyright: ignore[reportArgumentType]
    return model_rows.end_generation(model, case.vocab[known.stop], case.id_of(case.named("eos_token")), edits)
