"""Fault: the files promise an added token one id, and the tokenizer encodes it as another, or ids have holes."""

from __future__ import annotations

from collections import defaultdict

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, finding

SUBJECT = "tokenizer.added_tokens_decoder"


def check(case: Case) -> list[Finding]:
    """Report only: which of two ids the embedding was trained with cannot be told from the tokenizer."""
    listed = case.tokenizer.init_kwargs.get("added_tokens_decoder") or {}
    promised = {int(number): str(token) for number, token in listed.items()}
    return [*_dangling(case, promised), *_duplicates(promised), *_shared(case), *_holes(case)]


def _dangling(case: Case, promised: dict[int, str]) -> list[Finding]:
    """``tokenizer_config.json``, ``added_tokens.json`` and ``tokenizer.json`` against what is encoded."""
    found = []
    for number, token in sorted(promised.items()):
        actual = case.vocab.get(token)
        if actual != number:
            holder = case.backend.id_to_token(number)
            reason = f"{token!r} should have id {number}, which is {holder!r}, and is encoded as {actual}"
            found.append(
                finding("warned", SUBJECT, f"{reason}; correct the tokenizer's files, or texts use a wrong row")
            )
    return found


def _duplicates(promised: dict[int, str]) -> list[Finding]:
    ids = defaultdict(list)
    for number, token in promised.items():
        ids[token].append(number)
    return [
        finding("warned", SUBJECT, f"{token!r} is listed with the ids {numbers}: only one of them can be encoded")
        for token, numbers in ids.items()
        if len(numbers) > 1
    ]


def _shared(case: Case) -> list[Finding]:
    if len(set(case.vocab.values())) == len(case.vocab):
        return []
    tokens = defaultdict(list)
    for token, number in case.vocab.items():
        tokens[number].append(token)
    return [
        finding("warned", "tokenizer.vocab", f"{sorted(names)} share the id {number}; decoding shows only one of them")
        for number, names in tokens.items()
        if len(names) > 1
    ]


def _holes(case: Case) -> list[Finding]:
    highest, size = case.highest, len(case.vocab)
    if highest < size:
        return []
    reason = f"ids go up to {highest}, and there are {size} tokens"
    advice = f"resize the embedding to {highest + 1}, not to len(tokenizer)"
    return [finding("warned", "tokenizer.vocab", f"{reason}: {advice}")]
