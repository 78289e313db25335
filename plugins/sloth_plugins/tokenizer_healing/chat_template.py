"""Fault: the model's own chat template writes tokens that the tokenizer cuts to pieces.

The model has seen such a token as one id; as pieces it is a text like any other. The end of a turn is the worst of
them: no generation ends at a sequence of pieces. What the template writes is seen in a conversation that it renders, so
that what it keeps for tools does not count.
"""

from __future__ import annotations

import re

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, encode, finding, show
from sloth_plugins.tokenizer_healing.probes import CONVERSATION

SUBJECT = "tokenizer.chat_template"
LOOKS_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,48}\|>|<\uff5c[^\uff5c<>]{1,48}\uff5c>|<(?:start|end)_of_\w{1,24}>|</?s>|\[/?[A-Z][A-Z_]{2,24}\]"
)
"""``<|im_end|>``, ``<start_of_turn>``, ``</s>``, ``[INST]``: what authors call tokens that no text should contain."""
PLAIN = re.compile(r"<\|(?:system|user|assistant)\|>|\[/?[A-Z_]+\]")
"""Names that some formats write as plain text (Zephyr, Tulu; Llama 2, Mistral v1), where they are no tokens."""
FORMATS = {
    "<|im_": "chatml", "<|start_header_id|>": "llama-3.1", "<|eot_id|>": "llama-3.1", "<start_of_turn>": "gemma-3",
    "<end_of_turn>": "gemma-3", "<|end|>": "phi-3",
}  # fmt: skip
"""What a token begins with -> the format of ``get_chat_template`` that gives it an id."""


def heal(case: Case) -> list[Finding]:
    """Keep the template's tokens whole where the vocabulary has them; say what to do about the others."""
    text = render(case, prompt=True)
    if text is None:
        return []
    for message in CONVERSATION:
        text = text.replace(message["content"], "")
    written = list(dict.fromkeys(LOOKS_SPECIAL.findall(text)))
    split = [token for token in written if encode(case.backend, [token])[0] != [case.id_of(token)]]
    known = [token for token in split if token in case.vocab]
    return [*(one for token in known for one in _whole(case, token)), *_unknown(case, set(split) - set(known))]


def render(case: Case, prompt: bool = False) -> str | None:
    """A question and its answer as the template writes them, with what asks for an answer; None where it cannot."""
    if not case.templates():
        return None
    try:
        messages = [*CONVERSATION, CONVERSATION[0]] if prompt else list(CONVERSATION)
        return str(case.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # a template is the model author's program: it may raise anything; doubled.py reports it
        return None


def turn_end(case: Case) -> str | None:
    """What the template writes right after an answer: a token, or what looks like one; None where neither."""
    _, answer, after = (render(case) or "").rpartition(CONVERSATION[-1]["content"])
    rest = after.lstrip()
    if not answer or not rest:
        return None
    tokens = sorted((str(token) for token in case.added.values() if rest.startswith(str(token))), key=len)
    looks = LOOKS_SPECIAL.match(rest)
    return tokens[-1] if tokens else looks.group() if looks else None


def _whole(case: Case, token: str) -> list[Finding]:
    before, number, mark = encode(case.backend, [token])[0], case.vocab[token], case.edits.mark()
    case.mark_special(token)
    after = encode(case.backend, [token])[0]
    story = f"writes {show(token, number)}, which was cut into {before}"
    if after != [number]:
        case.edits.rollback(mark)
        return [finding("warned", SUBJECT, f"{story}; not mended: marked special it gives {after}")]
    return [finding("changed", SUBJECT, f"{story}; now it gives {after}")]


def _unknown(case: Case, tokens: set[str]) -> list[Finding]:
    """Tokens without an id: the format needs them, or it is one whose markers are plain text; only its end tells."""
    end = turn_end(case)
    if end not in tokens:
        tokens = {token for token in tokens if not PLAIN.fullmatch(token)}
    if not tokens:
        return []
    names = sorted(tokens)
    style = next((style for start, style in FORMATS.items() for token in names if token.startswith(start)), "chatml")
    advice = f"sloth_backend.get_chat_template(tokenizer, {style!r}, model=model) gives each an id without growth"
    reason = f"writes {', '.join(map(repr, names))}, which the vocabulary lacks: cut to pieces"
    if end in tokens:
        return [finding("warned", SUBJECT, f"{reason}, {end!r} cannot end an answer; {advice}")]
    return [finding("warned", SUBJECT, f"{reason}, a format that the model has not been trained on; {advice}")]
