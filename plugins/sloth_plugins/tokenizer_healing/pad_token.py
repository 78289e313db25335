"""Fault: no pad token, or one that means something else.

Collators mask the labels of pad tokens. Where pad is eos, the end of every answer is masked with it, and the model
never learns to stop. The vocabulary is not grown: a token that no text uses becomes pad.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, finding, show
from sloth_plugins.tokenizer_healing.special_tokens import unk_occurs

SUBJECT = "tokenizer.pad_token"
MADE_FOR_IT = (
    "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>",
    "<|PAD_TOKEN|>", "<｜▁pad▁｜>", "<|vision_pad|>", "<|fim_pad|>", "<fim_pad>",
)  # fmt: skip
"""Tokens whose name says that they are padding, best first."""

RESERVED = re.compile(
    r"[<\[]\|?(reserved|unused|placeholder|control|dummy|special)(_[a-z]+)*_?\d+\|?[>\]]|<\|extra_\d+\|>", re.IGNORECASE
)
"""Tokens kept free for later use, ``<|reserved_special_token_7|>``, ``<unused7>``, ``[control_7]``..."""

TERMINATORS = ("<|endoftext|>",)
"""Ends of documents that chat models no longer use; several of them name it as pad themselves."""


def heal(case: Case) -> list[Finding]:
    """Choose another pad token where there is none, or it is bos or eos."""
    before = fault(case)
    if before is None:
        return []
    token = choose(case)
    if token is None:
        advice = "no unused token to take: tokenizer.add_special_tokens({'pad_token': '<pad>'}), resize the embedding"
        return [finding("warned", SUBJECT, f"{before}; {advice}")]
    case.set_named("pad_token", token)
    return [finding("changed", SUBJECT, f"{before}; now {show(token, case.vocab[token])}")]


def fault(case: Case) -> str | None:
    """What is wrong with the pad token, in words; None where it is in order."""
    token = case.named("pad_token")
    number = case.id_of(token)
    if token is None or number is None:
        return "was " + show(token, number)
    roles = [role for role in ("eos", "bos") if case.id_of(case.named(f"{role}_token")) == number]
    return f"was {show(token, number)}, which is {' and '.join(roles)} too" if roles else None


def bring_within(case: Case, rows: int) -> list[Finding]:
    """Choose again where the pad token has no row in an embedding of ``rows`` rows, and another token has one."""
    token = case.named("pad_token")
    number = case.id_of(token)
    instead = choose(case, rows) if number is not None and number >= rows else None
    if instead is None:
        return []
    case.set_named("pad_token", instead)
    story = f"was {show(token, number)}, beyond the embedding's {rows} rows"
    return [finding("changed", SUBJECT, f"{story}; now {show(instead, case.vocab[instead])}")]


def choose(case: Case, rows: int | None = None) -> str | None:
    """A token that no text uses; None where the vocabulary has none.

    Args:
        case: the tokenizer.
        rows: how many rows the embedding has, where known: ids from there on will not do.
    """
    unk, templates = case.named("unk_token"), case.templates()
    # By id, not by name: in a damaged vocabulary two tokens may share one.
    ends = {case.id_of(case.named(role)) for role in ("bos_token", "eos_token")}
    taken = ends | {case.id_of(case.named(role)) for role in ("sep_token", "cls_token", "mask_token", "unk_token")}
    for token in _candidates(case):
        number = case.vocab[token]
        if number not in taken and token not in templates and (rows is None or number < rows):
            return token
    number = case.id_of(unk)
    if number is None or number in ends or unk_occurs(case):
        return None
    return unk if rows is None or number < rows else None


def _candidates(case: Case) -> Iterator[str]:
    yield from (token for token in MADE_FOR_IT if token in case.vocab)
    # The last ones first: whoever maps a template's tokens onto reserved ones starts at the front.
    yield from (text for _, token in sorted(case.added.items(), reverse=True) if RESERVED.fullmatch(text := str(token)))
    yield from (token for token in TERMINATORS if token in case.vocab)
