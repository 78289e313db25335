"""Texts through decode and encode, tokenizers through save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
)

from integration_tests.plugins.tokenizer_healing.common import BASE, actions, byte_level, heal, real_folder, state
from sloth_backend.findings import Edits
from sloth_plugins.tokenizer_healing.probes import PROBES


def test_healed_tokenizer_survives_save_and_load(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(real_folder(tmp_path / "in", "v1", add_bos_token=True))
    # What names code to run must not be asked about, let alone run.
    code = {"model_type": "llama", "auto_map": {"AutoTokenizer": ["absent.Slow", "absent.Fast"]}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(code))
    edits = Edits()
    found = actions(heal(tokenizer, edits))
    assert found["tokenizer.save_pretrained"] == "changed"
    texts = [*PROBES, "</s>x", "<s> x"]
    for name, config in {"bare": None, "llama": "llama"}.items():
        tokenizer.save_pretrained(tmp_path / name)
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps({"model_type": config}))
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded(texts).input_ids == tokenizer(texts).input_ids
        assert (loaded.pad_token, loaded.bos_token) == (tokenizer.pad_token, tokenizer.bos_token)
        assert heal(loaded) == []
    edits.rollback()
    assert type(tokenizer) is LlamaTokenizer


def test_a_users_own_change_that_a_reload_would_lose() -> None:
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "<pad>", "\u2581", *map(chr, range(33, 127))])}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    before, edits = state(tokenizer), Edits()
    assert actions(heal(tokenizer, edits))["tokenizer.save_pretrained"] == "changed"
    edits.rollback()
    assert state(tokenizer) == before


class Opinionated(LlamaTokenizer):
    """A class that does more than build its backend: turning it into another would lose that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def greet(self) -> str:
        return "hello"


def test_a_class_with_methods_is_not_exchanged() -> None:
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "<pad>", "\u2581", *map(chr, range(33, 127))])}
    tokenizer = Opinionated(vocab=vocab, merges=[], pad_token="<pad>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert actions(heal(tokenizer))["tokenizer.save_pretrained"] == "warned"
    assert tokenizer.greet() == "hello"


def test_a_tokenizer_that_cannot_be_saved() -> None:
    class Custom:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, part: [part])

    tokenizer = byte_level(pad_token="<pad>", **BASE)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    custom = pre_tokenizers.PreTokenizer.custom(Custom())  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([custom, byte])
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.save_pretrained")


def test_texts_that_do_not_survive_decoding() -> None:
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.decode")
    assert "' ' came back as ''" in finding.reason
