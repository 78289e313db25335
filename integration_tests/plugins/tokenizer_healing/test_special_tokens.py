"""pad, bos, eos and unk: missing, clashing, split, unknown to the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests.plugins.tokenizer_healing.common import (
    BASE,
    actions,
    byte_level,
    dressed,
    heal,
    real_folder,
    state,
)
from sloth_backend.findings import Edits


@pytest.mark.parametrize("pad", [None, "</s>", "<s>", "<gone>"])
@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        (["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], "<|reserved_special_token_1|>"),
        (["<unused7>", "<pad>"], "<pad>"),
        (["[PAD]"], "[PAD]"),
        (["[control_5]", "<|endoftext|>"], "[control_5]"),
        (["<|endoftext|>", "<|im_end|>"], "<|endoftext|>"),
        (["<|im_start|>"], None),
    ],
)
def test_pad_token(pad: str | None, tokens: list[str], chosen: str | None) -> None:
    tokenizer = byte_level(**BASE)
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.pad_token = pad
    before, size, edits = state(tokenizer), len(tokenizer), Edits()
    [finding] = [f for f in heal(tokenizer, edits) if f.subject == "tokenizer.pad_token"]
    assert tokenizer.pad_token == (chosen or pad)
    assert finding.action == ("changed" if chosen else "warned")
    assert repr(chosen) in finding.reason or "no unused token" in finding.reason
    assert len(tokenizer) == size
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id) or chosen is None
    edits.rollback()
    assert state(tokenizer) == before


def test_pad_is_not_a_token_that_the_template_uses() -> None:
    tokenizer = byte_level(**BASE)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<unused0>", "<unused1>"]})
    tokenizer.chat_template = "{% for m in messages %}<unused1>{{ m['content'] }}{% endfor %}"
    heal(tokenizer)
    assert tokenizer.pad_token == "<unused0>"


def test_pad_of_the_real_files(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(real_folder(tmp_path, "v2"))
    tokenizer.pad_token = tokenizer.eos_token
    heal(tokenizer)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[control_768]", 770)


def test_unk_is_pad_where_no_text_can_give_it(tmp_path: Path, trained: Callable[..., Path]) -> None:
    with_bytes = LlamaTokenizer.from_pretrained(dressed(tmp_path / "a", trained()))
    heal(with_bytes)
    assert with_bytes.pad_token == "<unk>"
    without = PreTrainedTokenizerFast.from_pretrained(dressed(tmp_path / "b", trained("no bytes", byte_fallback=False)))
    assert actions(heal(without))["tokenizer.pad_token"] == "warned"
    assert without.pad_token is None


def test_pad_that_is_an_ordinary_piece_becomes_one_token() -> None:
    tokenizer = byte_level("<pad>", **BASE)
    assert len(tokenizer.encode("<pad>")) > 1
    heal(tokenizer)
    assert tokenizer.encode("<pad>") == [tokenizer.pad_token_id]


def test_good_pad_is_kept() -> None:
    tokenizer = byte_level(pad_token="<mine>", **BASE)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<pad>"]})
    assert heal(tokenizer) == []
    assert tokenizer.pad_token == "<mine>"


def test_missing_eos_and_bos_come_from_sentencepiece(healthy: Any) -> None:
    healthy.eos_token = healthy.bos_token = None
    edits = Edits()
    findings = heal(healthy, edits)
    assert actions(findings) == {"tokenizer.eos_token": "changed", "tokenizer.bos_token": "changed"}
    assert (healthy.eos_token, healthy.bos_token) == ("</s>", "<s>")
    edits.rollback()
    assert healthy.eos_token is None


def test_missing_eos_without_a_truth() -> None:
    tokenizer = byte_level(pad_token="<pad>", bos_token="<s>")
    tokenizer.eos_token = None
    assert actions(heal(tokenizer)) == {"tokenizer.eos_token": "warned"}


def test_eos_that_is_not_in_the_vocabulary() -> None:
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    tokenizer.eos_token = "<|im_end|>"
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.eos_token")
    assert "not in the vocabulary" in finding.reason


def test_eos_that_texts_split() -> None:
    tokenizer = byte_level("<|end|>", pad_token="<pad>", **BASE)
    tokenizer.eos_token = "<|end|>"
    number, before, edits = tokenizer.eos_token_id, state(tokenizer), Edits()
    assert len(tokenizer.encode("<|end|>")) == 7
    assert actions(heal(tokenizer, edits)) == {"tokenizer.eos_token": "changed"}
    assert tokenizer.encode("a<|end|>")[-1] == tokenizer.eos_token_id == number
    edits.rollback()
    assert state(tokenizer) == before


def test_unk_that_is_eos(tmp_path: Path, trained: Callable[..., Path]) -> None:
    model = trained("no bytes", byte_fallback=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dressed(tmp_path, model), pad_token="<s>")
    tokenizer.eos_token = "<unk>"
    edits = Edits()
    assert actions(heal(tokenizer, edits))["tokenizer.eos_token"] == "changed"  # the file has one of its own
    assert tokenizer.eos_token == "</s>"
    edits.rollback()
    (tmp_path / "tokenizer.model").unlink()
    assert actions(heal(tokenizer))["tokenizer.unk_token"] == "warned"
    shared = byte_level(pad_token="<pad>", unk_token="<e>", eos_token="<e>", bos_token="<e>")
    assert heal(shared) == []  # as GPT-2 has it
