"""Find an id for each token that a chat format needs: on one that is there, on a reserved one, or on a new one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sloth_plugins.chat_templates.formats import Format
from sloth_plugins.tokenizer_healing.case import Case
from sloth_plugins.tokenizer_healing.pad_token import RESERVED
from sloth_plugins.tokenizer_healing.spm_file import Kind


@dataclass
class Placement:
    """Where the tokens of a chat format come to lie.

    Attributes:
        renamed: old name -> new name of tokens that give their ids.
        added: tokens that get new ids at the end of the vocabulary.
        marked: tokens that the vocabulary has, and that texts would cut into pieces.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)


def place(case: Case, style: Format, map_eos: bool) -> Placement:
    """Plan, without changing anything.

    Args:
        case: the tokenizer.
        style: the chat format.
        map_eos: whether the format's end of turn takes eos's id where the tokenizer lacks it.
    """
    added = case.added
    plan = Placement(marked=[t for t in style.special if t in case.vocab and case.vocab[t] not in added])
    missing = [token for token in style.special if token not in case.vocab]
    eos = case.named("eos_token")
    if map_eos and eos in case.vocab and style.stop in missing:
        plan.renamed[eos] = style.stop
        missing.remove(style.stop)
    free = free_tokens(case, style)
    for token in missing:
        old = next(free, None)
        if old is None:
            plan.added.append(token)
        else:
            plan.renamed[old] = token
    return plan


def free_tokens(case: Case, style: Format) -> Iterator[str]:
    """Tokens kept free for later use, lowest id first: pad tokens are chosen from the other end."""
    roles = {str(token) for token in case.tokenizer._special_tokens_map.values() if token is not None}
    used, added = roles | set(style.special), case.added
    for _, token in sorted((number, token) for token, number in case.vocab.items() if RESERVED.fullmatch(token)):
        if token in used or token in style.text:
            continue
        # A piece that is neither an added token nor a control piece may be part of a text, whatever its name.
        if case.vocab[token] in added or _kind(case, token) == Kind.CONTROL:
            yield token


def _kind(case: Case, token: str) -> Kind | None:
    return None if case.truth is None else case.truth.kind(token)
