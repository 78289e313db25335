"""Carry a plan out on a tokenizer: its tokens, its roles, its template; then see that every token is one id."""

from __future__ import annotations

from collections.abc import Mapping

from sloth_backend.config import SlothConfigError
from sloth_backend.findings import Action, Finding
from sloth_plugins.chat_templates import origin, renaming
from sloth_plugins.chat_templates.formats import Format
from sloth_plugins.chat_templates.placing import Placement
from sloth_plugins.chat_templates.rows import KEYS, reader
from sloth_plugins.tokenizer_healing.case import Case, encode, show

CAPABILITY = "chat_templates"
PROBE = "\n x"
"""Stands before and after each token when its encoding is checked."""


def apply(case: Case, style: Format, plan: Placement, mapping: Mapping[str, str], map_eos: bool) -> list[Finding]:
    """Change the tokenizer; every change goes into ``case.edits``.

    Raises:
        SlothConfigError: the result would not be what the format asks for.
    """
    found = [*_tokens(case, plan), *_bos(case, style), *_eos(case, style, map_eos), _template(case, style, mapping)]
    _list_special(case, style)
    split = [token for token in style.special if not _is_whole(case, token)]
    if split:
        reason = f"the tokenizer cuts {split} of the chat template {style.name} into pieces"
        raise SlothConfigError([f"{reason}, also as added tokens: its class or normalizer gets in the way"])
    return found


def _tokens(case: Case, plan: Placement) -> list[Finding]:
    before = case.vocab
    renaming.rename(case, plan.renamed)
    renaming.add(case, plan.added)
    for token in plan.marked:
        case.mark_special(token)
    found = [
        _finding("changed", "tokenizer.vocab", f"{show(new, before[old])} takes the place of {old!r}; nothing grew")
        for old, new in plan.renamed.items()
    ]
    found += [
        _finding("changed", "tokenizer.vocab", f"{show(token, case.vocab[token])} was added: no reserved token is left")
        for token in plan.added
    ]
    found += [
        _finding(
            "changed", "tokenizer.added_tokens", f"{show(token, before[token])} was an ordinary piece; now special"
        )
        for token in plan.marked
    ]
    return found + (origin.follow(case, plan.renamed, plan.added) if plan.renamed or plan.added else [])


def _bos(case: Case, style: Format) -> list[Finding]:
    """The format's bos where it wants one and the tokenizer names none."""
    bos = case.named("bos_token")
    if style.bos is None:
        number = case.id_of(bos)
        if number is None or encode(case.backend, ["x"], specials=True)[0][0] != number:
            return []
        reason = f"{style.name} starts without {bos!r}, which the tokenizer puts before plain text"
        return [_finding("skipped", "tokenizer.chat_template", f"kept as its authors have it: {reason}")]
    if bos is not None:
        return []
    if style.bos not in case.vocab:
        reason = f"missing, and the vocabulary has no {style.bos!r}: conversations start without"
        return [_finding("warned", "tokenizer.bos_token", reason)]
    case.set_named("bos_token", style.bos)
    return [_finding("changed", "tokenizer.bos_token", f"was missing; now {show(style.bos, case.vocab[style.bos])}")]


def _eos(case: Case, style: Format, map_eos: bool) -> list[Finding]:
    """The end of a turn as eos where asked for, and some eos in any case."""
    before = case.named("eos_token")
    wanted = style.stop if map_eos and style.stop else before
    if wanted is None:
        wanted = next((token for token in (style.eos, style.stop) if token in case.vocab), None)
    if wanted is None:
        reason = f"the chat template {style.name} ends turns with eos, and the tokenizer has none"
        raise SlothConfigError([f"{reason}: set tokenizer.eos_token first"])
    if wanted == before:
        return []
    case.set_named("eos_token", wanted)
    story = f"was {show(before, case.id_of(before))}; now {show(wanted, case.vocab[wanted])}"
    return [_finding("changed", "tokenizer.eos_token", story)]


def _template(case: Case, style: Format, mapping: Mapping[str, str]) -> Finding:
    before = "replaced" if case.templates() else "was missing"
    case.edits.set(case.tokenizer, "chat_template", reader(mapping, style) + style.text)
    names = [repr(mapping.get(key, key)) for key in (*KEYS, *style.roles) if key in mapping]
    also = f"; rows may have {', '.join(names)}" if names else ""
    return _finding("changed", "tokenizer.chat_template", f"{before}; now {style.name} ({style.source}){also}")


def _list_special(case: Case, style: Format) -> None:
    """Have ``tokenizer_config.json`` list the format's tokens among the special ones."""
    tokenizer = case.tokenizer
    listed = list(tokenizer._extra_special_tokens)
    known = {str(token) for token in (*listed, *tokenizer._special_tokens_map.values())}
    case.edits.set(tokenizer, "_extra_special_tokens", listed + [t for t in style.special if t not in known])


def _is_whole(case: Case, token: str) -> bool:
    text = encode(case.backend, [PROBE + token + PROBE])[0]
    return encode(case.backend, [token])[0] == [case.vocab[token]] and text.count(case.vocab[token]) == 1


def _finding(action: Action, subject: str, reason: str) -> Finding:
    return Finding(action, subject, reason, CAPABILITY)
