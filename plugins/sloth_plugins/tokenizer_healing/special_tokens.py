"""Faults of bos, eos and unk: missing, not in the vocabulary, one token in two roles, or cut to pieces in a text."""

from __future__ import annotations

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, encode, finding, show

ROLES = ("eos_token", "bos_token", "unk_token")
RARE = "".join(map(chr, range(0x80, 0xD800, 151))) + "".join(map(chr, range(0xE000, 0x110000, 9973))) + "\x00\x07\x7f"
"""Characters from all over Unicode: a tokenizer that has bytes to fall back on needs no unk for them."""


def heal(case: Case) -> list[Finding]:
    """Name eos, bos and unk where the origin knows them, keep eos and bos whole, and report what is left."""
    found = [one for role in ROLES for one in _missing(case, role)] + _clashes(case)
    for role in ROLES:
        found += _dangling(case, role) or (_split(case, role) if role != "unk_token" else [])
    return found


def unk_occurs(case: Case) -> bool:
    """Whether a text can become unk: it cannot where bytes stand in for unknown characters."""
    unk = case.id_of(case.named("unk_token"))
    return unk is not None and unk in encode(case.backend, [RARE])[0]


def _missing(case: Case, role: str) -> list[Finding]:
    if case.named(role) is not None:
        return []
    origin = case.origin
    number = None if origin is None else origin.role(role)
    token = None if number is None else case.backend.id_to_token(number)
    if origin is not None and token is not None:
        case.set_named(role, token)
        reason = f"was missing; now {show(token, number)}, as {origin.path.name} has it"
        return [finding("changed", f"tokenizer.{role}", reason)]
    if role != "eos_token":
        return []  # many models have no bos, and those that fall back on bytes need no unk
    return [
        finding(
            "warned",
            "tokenizer.eos_token",
            "missing: a model trained without one never learns to stop; set tokenizer.eos_token",
        )
    ]


def _dangling(case: Case, role: str) -> list[Finding]:
    token = case.named(role)
    if token is None or case.id_of(token) is not None:
        return []
    actual = case.id_of(case.named("unk_token"))  # transformers calls itself without end where unk is the one missing
    reason = f"{token!r} is not in the vocabulary, so it becomes {'no id' if actual is None else f'id {actual}'}"
    reason += "; add it and resize the embedding, or name another"
    return [finding("warned", f"tokenizer.{role}", reason)]


def _split(case: Case, role: str) -> list[Finding]:
    token = case.named(role)
    number = case.id_of(token)
    if token is None or number is None:
        return []
    before = encode(case.backend, [token])[0]
    if before == [number]:
        return []
    mark = case.edits.mark()
    case.mark_special(token)
    after = encode(case.backend, [token])[0]
    story = f"{show(token, number)} in a text was cut into {before}"
    if after != [number]:
        case.edits.rollback(mark)
        return [finding("warned", f"tokenizer.{role}", f"{story}; not mended: marked special it gives {after}")]
    return [finding("changed", f"tokenizer.{role}", f"{story}; now it gives {after}")]


def _clashes(case: Case) -> list[Finding]:
    found = [one for role in ROLES for one in _taken(case, role)]
    unk = case.named("unk_token")
    roles = [role for role in ("eos_token", "bos_token") if unk is not None and case.named(role) == unk]
    if not roles or not unk_occurs(case):
        return found  # bos == eos is common and harmless, and so is a shared unk that no text can produce
    names = " and ".join(roles)
    reason = (
        f"{show(unk, case.id_of(unk))} is {names} too: every unknown character reads as one; give {names} another token"
    )
    return [*found, finding("warned", "tokenizer.unk_token", reason)]


def _taken(case: Case, role: str) -> list[Finding]:
    """A role with another role's token, while the origin has one of its own for it."""
    token, origin = case.named(role), case.origin
    number = None if origin is None else origin.role(role)
    own = None if number is None else case.backend.id_to_token(number)
    others = [other for other in ROLES if other != role and case.named(other) == token]
    if origin is None or own is None or token in (None, own) or not others:
        return []
    case.set_named(role, own)
    reason = f"was {show(token, case.id_of(token))}, which is {' and '.join(others)} too"
    return [finding("changed", f"tokenizer.{role}", f"{reason}; now {show(own, number)}, as {origin.path.name} has it")]
