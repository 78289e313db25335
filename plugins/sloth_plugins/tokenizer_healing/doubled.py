"""Fault: BOS twice at the start of a text, or EOS twice at its end.

Where hosts get their BOS from: plain text goes through ``tokenizer(text)``, so the post-processor adds it; messages go
through ``apply_chat_template``, which tokenises without special tokens, so the template has to bring it. Each path is
checked by itself. A text that was rendered beforehand and is then tokenised as plain text gets both.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import processors

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, encode, finding, show
from sloth_plugins.tokenizer_healing.probes import CONVERSATION

TEXT = "x"


def heal(case: Case) -> list[Finding]:
    """Mend a post-processor that adds a token twice; report a template that does."""
    return [*_post_processor(case), *_policy(case), *_template(case)]


def _post_processor(case: Case) -> list[Finding]:
    bos, eos = case.id_of(case.named("bos_token")), case.id_of(case.named("eos_token"))
    before = encode(case.backend, [TEXT], specials=True)[0]
    if not encode(case.backend, [TEXT])[0]:
        return []
    fronts, ends = _count(before, bos), _count(before[::-1], eos)
    if max(fronts, ends) < 2:
        return []
    backend, old = case.backend, case.backend.post_processor
    backend.post_processor = _once(case, fronts > 0, ends > 0)
    wanted = before[max(0, fronts - 1) : len(before) - max(0, ends - 1)]
    after = encode(backend, [TEXT], specials=True)[0]
    if after != wanted:
        backend.post_processor = old
        reason = f"{TEXT!r} gives {before}; not mended: the post-processor would change more than that"
        return [finding("warned", "tokenizer.post_processor", reason)]
    case.edits.on_undo(lambda: setattr(backend, "post_processor", old))
    return [finding("changed", "tokenizer.post_processor", f"doubled bos or eos: {TEXT!r} gave {before}; now {after}")]


def _once(case: Case, front: bool, end: bool) -> Any:
    """A post-processor that adds BOS, EOS or both once, and keeps how byte-level tokenizers report offsets."""
    bos, eos = case.named("bos_token"), case.named("eos_token")
    single, second = ([*[f"{bos}:{i}"] * front, f"${name}:{i}", *[f"{eos}:{i}"] * end] for i, name in enumerate("AB"))
    tokens = [(token, case.vocab[token]) for token, used in ((bos, front), (eos, end)) if used and token]
    once = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=list(dict(tokens).items()))
    old = json.loads(case.backend.post_processor.__getstate__())
    offsets = [part for part in old.get("processors", [old]) if part["type"] == "ByteLevel"]
    if not offsets:
        return once
    return processors.Sequence([processors.ByteLevel(trim_offsets=offsets[0]["trim_offsets"]), once])


def _policy(case: Case) -> list[Finding]:
    """BOS that the configuration asks for and that is not added, or that nothing says anything about."""
    bos = case.named("bos_token")
    if case.id_of(bos) is None or _count(encode(case.backend, [TEXT], specials=True)[0], case.id_of(bos)):
        return []
    subject = "tokenizer.add_bos_token"
    if case.tokenizer.add_bos_token:
        backend, old = case.backend, case.backend.post_processor
        case.edits.on_undo(lambda: setattr(backend, "post_processor", old))
        case.tokenizer.update_post_processor()
        return [finding("changed", subject, f"is set, but {TEXT!r} started without {bos!r}; now it starts with it")]
    if case.origin is None or case.has_pipeline_file or "add_bos_token" in case.tokenizer.init_kwargs:
        return []
    reason = "neither tokenizer_config.json nor tokenizer.json says whether texts start with bos, and they do not"
    advice = "if the model was trained with it, set tokenizer.add_bos_token = True"
    return [finding("warned", subject, f"{reason}; {advice}")]


def _template(case: Case) -> list[Finding]:
    bos = case.named("bos_token")
    number = case.id_of(bos)
    if number is None or not case.templates():
        return []
    try:
        text = str(case.tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False))
    except Exception as error:  # a template is the model author's program: it may raise anything
        reason = f"does not render a question and an answer ({type(error).__name__}: {error}); not checked"
        return [finding("skipped", "tokenizer.chat_template", reason)]
    rendered, again = (_count(encode(case.backend, [text], specials)[0], number) for specials in (False, True))
    if rendered > 1:
        reason = f"starts every conversation with {rendered} times {show(bos, number)}"
        return [finding("warned", "tokenizer.chat_template", f"{reason}; remove all but one from the template")]
    if again > 1:
        reason = f"kept: messages get {rendered} {bos!r}, text rendered beforehand and tokenised as plain text {again}"
        return [finding("skipped", "tokenizer.chat_template", f"{reason}; train on messages, or render without it")]
    return []


def _count(ids: list[int], token: int | None) -> int:
    """How many times ``token`` stands at the front of ``ids``."""
    return next((place for place, number in enumerate(ids) if number != token), len(ids))
