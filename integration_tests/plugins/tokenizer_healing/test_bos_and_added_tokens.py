"""Added tokens that clash, and BOS or EOS twice or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests.plugins.tokenizer_healing.common import (
    BASE,
    actions,
    byte_level,
    dressed,
    edit_backend,
    heal,
    state,
)
from sloth_backend.findings import Edits


def test_files_that_promise_another_id(healthy: Any, folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    taken = healthy.convert_ids_to_tokens(300)
    config["added_tokens_decoder"] = {"300": {"content": "<tool>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    [finding] = heal(AutoTokenizer.from_pretrained(folder))
    assert (finding.action, finding.subject) == ("warned", "tokenizer.added_tokens_decoder")
    assert f"'<tool>' should have id 300, which is {taken!r}" in finding.reason


def test_a_token_listed_twice(healthy: Any, folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    entry = {"content": "<tool>", "special": True}
    config["added_tokens_decoder"] = {"600": entry, "601": entry}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reasons = [f.reason for f in heal(AutoTokenizer.from_pretrained(folder))]
    assert any("'<tool>' is listed with the ids [600, 601]" in reason for reason in reasons)


def shared_id() -> PreTrainedTokenizerFast:
    """A tokenizer whose ``<|pad|>`` has the id of eos."""
    tokenizer = byte_level("</s>", "<pad>", **BASE)
    edit_backend(tokenizer, lambda content: content["model"]["vocab"].update({"<|pad|>": tokenizer.eos_token_id}))
    return tokenizer


def test_two_tokens_with_one_id() -> None:
    tokenizer = shared_id()
    tokenizer.pad_token = "<pad>"
    findings = heal(tokenizer)
    reasons = [f.reason for f in findings if f.subject == "tokenizer.vocab" and f.action == "warned"]
    assert f"['</s>', '<|pad|>'] share the id {tokenizer.eos_token_id}" in reasons[0]


def test_pad_whose_id_is_eos_under_another_name() -> None:
    tokenizer = shared_id()
    tokenizer.pad_token = "<|pad|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert actions(heal(tokenizer))["tokenizer.pad_token"] == "changed"
    assert tokenizer.pad_token == "<pad>"


def test_ids_with_holes() -> None:
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    edit_backend(tokenizer, lambda content: content["model"]["vocab"].update({"far": 900}))
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.vocab")
    assert "resize the embedding to 901" in finding.reason


def template(single: str, tokenizer: Any) -> processors.TemplateProcessing:
    """A post-processor of ``tokenizer``'s own tokens."""
    return processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [
        ("<s> <s> $A", "BBx", "Bx"),
        ("<s> <s> <s> $A </s>", "BBBxE", "BxE"),
        ("<s> $A </s> </s>", "BxEE", "BxE"),
        ("$A </s> </s>", "xEE", "xE"),
    ],
)
@pytest.mark.parametrize("offsets", [False, True])
def test_doubled_by_the_post_processor(single: str, before: str, after: str, offsets: bool) -> None:
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    post_processor = template(single, tokenizer)
    if offsets:
        post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), post_processor])
    tokenizer.backend_tokenizer.post_processor = post_processor
    ids = {"B": tokenizer.bos_token_id, "E": tokenizer.eos_token_id, "x": tokenizer.convert_tokens_to_ids("x")}
    assert tokenizer("x").input_ids == [ids[c] for c in before]
    edits = Edits()
    assert actions(heal(tokenizer, edits)) == {"tokenizer.post_processor": "changed"}
    assert tokenizer("x").input_ids == [ids[c] for c in after]
    assert (
        "trim_offsets" in tokenizer.backend_tokenizer.to_str().split("post_processor")[1].split("decoder")[0]
    ) is offsets
    edits.rollback()
    assert tokenizer("x").input_ids == [ids[c] for c in before]


def with_template(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS to plain text and has a chat template that starts with ``text``."""
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    tokenizer.backend_tokenizer.post_processor = template("<s> $A", tokenizer)
    tokenizer.chat_template = text + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def test_template_that_doubles_bos() -> None:
    [finding] = heal(with_template("{{ bos_token }}<s>"))
    assert (finding.action, finding.subject) == ("warned", "tokenizer.chat_template")
    assert "2 times '<s>'" in finding.reason


def test_template_and_post_processor_are_each_right() -> None:
    tokenizer = with_template("{{ bos_token }}")
    before = state(tokenizer)
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("skipped", "tokenizer.chat_template")
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages)["input_ids"].count(tokenizer.bos_token_id) == 1
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(rendered).input_ids.count(tokenizer.bos_token_id) == 2  # what the finding warns of
    assert state(tokenizer) == before


def test_template_that_brings_no_bos() -> None:
    assert heal(with_template("")) == []


def test_template_that_fails() -> None:
    [finding] = heal(with_template("{{ raise_exception('only for tools') }}"))
    assert (finding.action, finding.subject) == ("skipped", "tokenizer.chat_template")
    assert "only for tools" in finding.reason


def test_bos_that_the_configuration_asks_for(tmp_path: Path, trained: Callable[..., Path]) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(dressed(tmp_path, trained(), add_bos_token=True))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    before, edits = state(tokenizer), Edits()
    assert actions(heal(tokenizer, edits))["tokenizer.add_bos_token"] == "changed"
    ids = tokenizer("x").input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    edits.rollback()
    assert state(tokenizer) == before


@pytest.mark.parametrize(("config", "warned"), [({}, True), ({"add_bos_token": False}, False)])
def test_bos_that_nothing_says_anything_about(
    tmp_path: Path, trained: Callable[..., Path], config: dict[str, bool], warned: bool
) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(dressed(tmp_path, trained(), **config))
    found = actions(heal(tokenizer))
    assert (found.get("tokenizer.add_bos_token") == "warned") is warned
    assert tokenizer("x").input_ids[0] != tokenizer.bos_token_id
