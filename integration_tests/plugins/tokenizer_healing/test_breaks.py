"""A tokenizer broken on purpose, in each way that SentencePiece tells, and what stays as it was."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests import tiny
from integration_tests.plugins.tokenizer_healing.common import (
    actions,
    assert_not_compared,
    dressed,
    edit_backend,
    heal,
    random_texts,
    real_folder,
    state,
)
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits
from sloth_backend.manager import SlothManager
from sloth_backend.phases import Session, after_load, before_data
from sloth_backend.run import Run
from sloth_plugins import tokenizer_healing
from sloth_plugins.tokenizer_healing import truth
from sloth_plugins.tokenizer_healing.case import encode


def shuffle_merges(content: dict[str, Any]) -> None:
    random.Random(0).shuffle(content["model"]["merges"])


def lose_merge(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    results = ["".join(pair) for pair in merges]
    longest = max(results, key=len)
    content["model"]["merges"] = [pair for pair, result in zip(merges, results, strict=True) if result != longest]


def lose_bytes(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


def lose_byte_decoder(content: dict[str, Any]) -> None:
    content["decoder"]["decoders"] = [part for part in content["decoder"]["decoders"] if part["type"] != "ByteFallback"]


def normalize(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, content["normalizer"]]}


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}


def usual_metaspace(content: dict[str, Any]) -> None:
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    content.update(normalizer=None, pre_tokenizer=metaspace)


def split_words(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def no_pipeline(content: dict[str, Any]) -> None:
    content.update(normalizer=None, pre_tokenizer=None, decoder=None)


def merges_ignored(content: dict[str, Any]) -> None:
    content["model"]["merges"] = []


BREAKS = [
    shuffle_merges,
    lose_merge,
    lose_bytes,
    lose_byte_decoder,
    normalize,
    lowercase,
    usual_metaspace,
    split_words,
    no_pipeline,
    merges_ignored,
]


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_each_way_to_break_it_is_found_and_healed(
    healthy: Any, stdlib_lines: list[str], change: Callable[[dict[str, Any]], None]
) -> None:
    texts = stdlib_lines[:800] + random_texts(200)
    expected = encode(healthy.backend_tokenizer, texts, specials=True)
    edit_backend(healthy, change)
    broken = state(healthy)
    edits = Edits()
    findings = heal(healthy, edits)
    assert actions(findings) == {"tokenizer.encode": "changed"}
    assert " instead of " in findings[0].reason
    assert encode(healthy.backend_tokenizer, texts, specials=True) == expected
    assert heal(healthy) == []
    edits.rollback()
    assert state(healthy) == broken


def test_healthy_tokenizers_have_no_findings(healthy: Any) -> None:
    before, edits = state(healthy), Edits()
    assert heal(healthy, edits) == []
    assert edits.mark() == 0
    assert state(healthy) == before


@pytest.mark.parametrize("legacy", [True, False])
def test_prefix_after_special_tokens_stays_as_it_was(
    tmp_path: Path, trained: Callable[..., Path], legacy: bool
) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(dressed(tmp_path, trained(), legacy=legacy))
    before = tokenizer.tokenize("</s>x")
    heal(tokenizer)
    assert tokenizer.tokenize("</s>x") == before == ["</s>", *(["\u2581", "x"] if legacy else ["x"])]


def test_a_user_who_wants_no_prefix_gets_none(tmp_path: Path, trained: Callable[..., Path]) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(dressed(tmp_path, trained()), add_prefix_space=False)
    heal(tokenizer)
    assert tokenizer.tokenize("x  y")[0] == "x"


def test_renamed_control_tokens_keep_their_names(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(real_folder(tmp_path, "v3"))

    def rename(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab["<|im_start|>"] = vocab.pop("[control_20]")
        for token in content["added_tokens"]:
            token["content"] = token["content"].replace("[control_20]", "<|im_start|>")

    edit_backend(tokenizer, rename)
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert actions(heal(tokenizer))["tokenizer.encode"] == "changed"
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [number]


def test_added_tokens_survive(healthy: Any) -> None:
    healthy.add_tokens([AddedToken("<tool>", lstrip=True, special=True), "ordinary"])
    ids = healthy.convert_tokens_to_ids(["<tool>", "ordinary"])
    edit_backend(healthy, shuffle_merges)
    assert actions(heal(healthy))["tokenizer.encode"] == "changed"
    assert healthy.convert_tokens_to_ids(["<tool>", "ordinary"]) == ids
    assert healthy.added_tokens_decoder[ids[0]].lstrip
    assert ids[0] in healthy("a <tool>b").input_ids


def test_padding_and_truncation_survive(healthy: Any) -> None:
    healthy.backend_tokenizer.enable_truncation(5)
    healthy.backend_tokenizer.enable_padding(length=9, pad_token="<unk>")
    edit_backend(healthy, shuffle_merges)
    heal(healthy)
    assert healthy.backend_tokenizer.truncation["max_length"] == 5
    assert healthy.backend_tokenizer.padding["length"] == 9


def test_model_of_another_tokenizer(healthy: Any, folder: Path, trained: Callable[..., Path]) -> None:
    shutil.copy(trained("symbols", user_defined_symbols=["<sep>", "foo"]), folder / "tokenizer.model")
    assert_not_compared(healthy)


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "suffix": {"treat_whitespace_as_suffix": True},
        "word": {"model_type": "word", "byte_fallback": False, "hard_vocab_limit": False},
        "unigram": {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc"},
    }.items(),
)
def test_what_cannot_be_rebuilt_is_reported_and_left(
    tmp_path: Path, trained: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    model = trained(name, **options)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dressed(tmp_path, model))
    backend = tokenizer.backend_tokenizer
    finding = heal(tokenizer)[0]
    assert (finding.action, finding.subject) == ("warned", "tokenizer.encode")
    assert "not mended" in finding.reason
    assert tokenizer.backend_tokenizer is backend


def test_a_rebuilt_one_that_differs_is_not_taken(healthy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_backend(healthy, shuffle_merges)
    backend = healthy.backend_tokenizer
    monkeypatch.setattr(truth, "rebuild", lambda case, _: Tokenizer.from_str(case.backend.to_str()))
    assert "a rebuilt one still differs" in heal(healthy)[0].reason
    assert healthy.backend_tokenizer is backend


@pytest.mark.parametrize("content", [b"", b"\x00\x01garbage", b"\x0a\xff\xff", "half"])
def test_corrupt_sentencepiece_model(healthy: Any, folder: Path, content: bytes | str) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if isinstance(content, str) else content)
    [finding] = heal(healthy)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.encode")
    assert "tokenizer.model cannot be read as a SentencePiece model" in finding.reason


def test_through_the_phases_and_back(folder: Path) -> None:
    manager = SlothManager()
    manager.register(tokenizer_healing, "tokenizer_healing")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edit_backend(tokenizer, usual_metaspace)
    tokenizer.pad_token = tokenizer.eos_token
    before = state(tokenizer)
    model = tiny.make_model(tokenizer, pad_token_id=None)
    session = Session(Run("user", SlothConfig()), manager)
    before_data(session, tokenizer)
    after_load(session, model, tokenizer)
    changed = session.report().of(action="changed", capability="tokenizer_healing")
    assert [f.subject for f in changed] == [
        "tokenizer.encode",
        "tokenizer.pad_token",
        "model.config.pad_token_id",
        "model.generation_config.pad_token_id",
    ]
    assert {f.plugin for f in changed} == {"tokenizer_healing"}
    session.edits.rollback()
    assert state(tokenizer) == before
    assert model.config.pad_token_id is None
