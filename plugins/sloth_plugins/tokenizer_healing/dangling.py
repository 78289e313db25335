"""Fault: placeholders at the end of the vocabulary that the model has no rows for.

A tokenizer that was given reserved tokens, or a pad token, goes on naming them when it is saved beside
a model that was never resized. Nothing uses them, but a text that happens to contain one ends the run with an index
error, and ``len(tokenizer)`` makes hosts resize the embeddings.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from torch import nn

from sloth_backend.findings import Finding
from sloth_backend.phases import base_model
from sloth_plugins.tokenizer_healing.case import Case, finding
from sloth_plugins.tokenizer_healing.model_ids import embedding_rows
from sloth_plugins.tokenizer_healing.pad_token import MADE_FOR_IT, RESERVED, bring_within

SUBJECT = "tokenizer.vocab"


def heal(case: Case, model: nn.Module) -> list[Finding]:
    """Take placeholders beyond the embedding out of the tokenizer; a token with a name of its own may be a user's."""
    rows = embedding_rows(base_model(model))
    if rows is None or case.highest < rows:
        return []
    found = bring_within(case, rows)
    beyond = [str(token) for number, token in sorted(case.added.items()) if number >= rows]
    unused = [token for token in beyond if token in MADE_FOR_IT or RESERVED.fullmatch(token)]
    content = json.loads(case.backend.to_str())
    own, after = content["model"]["vocab"], json.dumps(content["post_processor"], ensure_ascii=False)
    roles = {str(token) for token in case.tokenizer._special_tokens_map.values() if token is not None}
    used = case.templates()
    unused = [t for t in unused if t not in own and t not in roles and t not in used and json.dumps(t) not in after]
    if not unused:
        return found
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in unused]
    _take_out(case, content, set(unused))
    names = ", ".join(map(repr, unused[:3])) + ("..." if len(unused) > 3 else "")
    reason = f"had {len(unused)} placeholders ({names}) beyond the embedding's {rows} rows, which nothing uses"
    return [*found, finding("changed", SUBJECT, f"{reason}; now the ids end at {case.highest}")]


def _take_out(case: Case, content: dict, tokens: set[str]) -> None:
    split = case.backend.encode_special_tokens
    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = split
    case.set_backend(backend)
    tokenizer, edits = case.tokenizer, case.edits
    kept = [token for token in tokenizer._extra_special_tokens if str(token) not in tokens]
    edits.set(tokenizer, "_extra_special_tokens", kept)
    settings = dict(tokenizer.init_kwargs)
    listed = settings.get("added_tokens_decoder")
    if listed:
        settings["added_tokens_decoder"] = {i: token for i, token in listed.items() if str(token) not in tokens}
    if settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = [t for t in settings["extra_special_tokens"] if str(t) not in tokens]
    edits.set(tokenizer, "init_kwargs", settings)
    case.forget()
