"""A model's own chat template whose tokens the tokenizer cuts to pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.tokenizer_healing.common import BASE, byte_level, edit_backend, heal, real_folder, state
from sloth_backend.findings import Edits, Finding

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TOOLS = "{% if tools %}<|tool_list|>{% endif %}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
INST = "{% for m in messages %}[INST]{{ m['content'] }}{{ eos_token }}{% endfor %}"


def told(tokenizer: Any, edits: Edits | None = None) -> list[Finding]:
    """The findings about the template."""
    return [finding for finding in heal(tokenizer, edits) if finding.subject == "tokenizer.chat_template"]


def with_template(text: str, *pieces: str) -> Any:
    tokenizer = byte_level(*pieces, pad_token="<pad>", **BASE)
    tokenizer.chat_template = text
    return tokenizer


def test_tokens_that_the_vocabulary_has_are_made_whole() -> None:
    tokenizer = with_template(CHATML, "<|im_start|>", "<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert len(tokenizer.encode("<|im_end|>")) > 1
    before, edits, size = state(tokenizer), Edits(), len(tokenizer)
    findings = told(tokenizer, edits)
    assert [finding.action for finding in findings] == ["changed", "changed"]
    for finding, token, number in zip(findings, ("<|im_start|>", "<|im_end|>"), ids, strict=True):
        assert f"{token!r} (id {number})" in finding.reason
        assert f"now it gives [{number}]" in finding.reason
        assert tokenizer.encode(token) == [number]
    assert len(tokenizer) == size
    assert told(tokenizer) == []
    edits.rollback()
    assert state(tokenizer) == before


def test_tokens_that_the_vocabulary_lacks_are_reported_with_what_mends_them() -> None:
    tokenizer = with_template(CHATML)
    before = state(tokenizer)
    [finding] = told(tokenizer)
    assert finding.action == "warned"
    assert "'<|im_end|>', '<|im_start|>', which the vocabulary lacks" in finding.reason
    assert "'<|im_end|>' cannot end an answer" in finding.reason
    assert "get_chat_template(tokenizer, 'chatml', model=model)" in finding.reason
    assert state(tokenizer) == before
    tokenizer.add_special_tokens({"extra_special_tokens": ["<unused0>", "<unused1>"]})
    sloth_backend.get_chat_template(tokenizer, "chatml")
    assert told(tokenizer) == []


def test_a_start_of_turn_that_is_cut_while_its_end_is_not() -> None:
    tokenizer = with_template(CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    [finding] = told(tokenizer)
    assert "'<|im_start|>', which the vocabulary lacks" in finding.reason
    assert "has not been trained on" in finding.reason


@pytest.mark.parametrize("text", [ZEPHYR, INST, TOOLS], ids=["zephyr", "inst", "tools"])
def test_formats_with_markers_of_plain_text_have_no_finding(text: str) -> None:
    assert told(with_template(text)) == []


def test_a_plain_marker_that_ends_the_turn_is_a_fault() -> None:
    text = "{% for m in messages %}{{ m['content'] }}<|user|>{% endfor %}"
    [finding] = told(with_template(text))
    assert "'<|user|>' cannot end an answer" in finding.reason


def test_control_tokens_of_a_real_file(tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(real_folder(tmp_path, "v3", add_bos_token=True))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}[/INST]{% endfor %}"
    assert not [finding for finding in told(tokenizer) if finding.action == "changed"]

    def forget(content: dict[str, Any]) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if "INST" not in token["content"]]

    edit_backend(tokenizer, forget)
    assert len(tokenizer.encode("[INST]", add_special_tokens=False)) > 1
    assert [finding.action for finding in told(tokenizer) if finding.action != "skipped"] == ["changed", "changed"]
    assert tokenizer.encode("[INST]", add_special_tokens=False) == [3]


def test_templates_of_ours_and_of_the_tiny_tokenizer_have_no_finding() -> None:
    assert told(tiny.make_tokenizer()) == []
    for name in ("zephyr", "vicuna", "alpaca", "mistral-v1"):
        tokenizer = byte_level(pad_token="<pad>", **BASE)
        sloth_backend.get_chat_template(tokenizer, name)
        assert told(tokenizer) == [], name
