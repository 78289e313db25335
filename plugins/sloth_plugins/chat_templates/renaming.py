"""Give tokens other names, or new ids, in everything that a tokenizer consists of.

A name stands in many places: the model's vocabulary, the added tokens, the post-processor, the roles (eos...), the
lists that ``tokenizer_config.json`` is written from. ``edits`` gets the way back for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from sloth_plugins.tokenizer_healing.case import Case


def rename(case: Case, names: Mapping[str, str]) -> None:
    """Give each token of ``names`` (old -> new) its new name; ids, and every other token, stay.

    Args:
        case: the tokenizer, changed in place.
        names: the old ones are in the vocabulary, the new ones are not.
    """
    if not names:
        return
    old = case.backend
    new = Tokenizer.from_str(json.dumps(_renamed_backend(json.loads(old.to_str()), names)))
    new.encode_special_tokens = old.encode_special_tokens
    new.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    case.set_backend(new)
    _rename_settings(case, names)
    case.forget()


def add(case: Case, tokens: list[str]) -> None:
    """Add special tokens at the end of the vocabulary."""
    if not tokens:
        return
    clone = Tokenizer.from_str(case.backend.to_str())
    clone.encode_special_tokens = case.backend.encode_special_tokens
    clone.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    case.set_backend(clone)
    case.forget()


def _renamed_backend(content: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """``tokenizer.json`` with other names.

    Merges from or to a renamed token go: it is cut out of a text before the model sees the text, so none ever applied.
    """
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if names.keys().isdisjoint(_parts(merge))]
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {**token, **plain, "content": names[token["content"]]} if token["content"] in names else token
        for token in content["added_tokens"]
    ]
    for part in ("post_processor", "padding"):
        content[part] = replaced(content[part], names)
    return content


def _parts(merge: list[str] | str) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def replaced(value: Any, names: Mapping[str, str]) -> Any:
    """``value`` with every text that is an old name replaced, however deep, keys included."""
    if isinstance(value, AddedToken):
        return replaced(str(value), names) if str(value) in names else value
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict):
        return {replaced(key, names): replaced(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(item, names) for item in value)
    return value


def _rename_settings(case: Case, names: Mapping[str, str]) -> None:
    """Roles, lists of special tokens, and what ``save_pretrained`` writes into ``tokenizer_config.json``."""
    tokenizer = case.tokenizer
    for name in ("_special_tokens_map", "_extra_special_tokens"):
        case.edits.set(tokenizer, name, replaced(getattr(tokenizer, name), names))
    kept = ("vocab_file", "tokenizer_file", "name_or_path", "chat_template")
    settings = {k: v if k in kept else replaced(v, names) for k, v in tokenizer.init_kwargs.items()}
    case.edits.set(tokenizer, "init_kwargs", settings)
