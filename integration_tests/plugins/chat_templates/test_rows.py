"""ShareGPT's rows and others: read by the template itself, so by every host, and wrong mappings refused."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from trl.data_utils import maybe_convert_to_chatml

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.chat_templates.fixtures import CONVERSATIONS
from sloth_backend import SlothConfigError

SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
NAMES = {"user": "human", "assistant": "gpt"}


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": NAMES.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


@pytest.mark.parametrize("name", ["chatml", "llama-3.1", "mistral", "gemma-3", "qwen-2.5", "alpaca"])
def test_both_kinds_of_rows_render_alike(name: str) -> None:
    plain = sloth_backend.get_chat_template(tiny.make_tokenizer(), name)
    mapped = sloth_backend.get_chat_template(tiny.make_tokenizer(), name, mapping=SHAREGPT)
    messages = CONVERSATIONS["turns"]
    expected = plain.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    half = [{"role": NAMES.get(m["role"], m["role"]), "content": m["content"]} for m in messages]
    filled = [{**row, "role": None, "content": None} for row in sharegpt(messages)]
    by_trl = maybe_convert_to_chatml({"conversations": sharegpt(messages)})["messages"]
    for rows in (sharegpt(messages), messages, half, filled, by_trl):
        assert mapped.apply_chat_template(rows, return_dict=True, return_assistant_tokens_mask=True) == expected


def test_a_batch_of_rows() -> None:
    tokenizer = sloth_backend.get_chat_template(tiny.make_tokenizer(), "chatml", mapping=SHAREGPT)
    rows = sharegpt(CONVERSATIONS["ended"])
    assert (
        tokenizer.apply_chat_template([rows, rows], tokenize=False)
        == [tokenizer.apply_chat_template(rows, tokenize=False)] * 2
    )


def test_names_that_need_quoting() -> None:
    mapping = {"role": "who's", "content": 'a"b', "user": "й", "assistant": "\\"}
    tokenizer = sloth_backend.get_chat_template(tiny.make_tokenizer(), "chatml", mapping=mapping)
    rows = [{"who's": "й", 'a"b': "Hello?"}, {"who's": "\\", 'a"b': ""}]
    text = tokenizer.apply_chat_template(rows, tokenize=False)
    assert text == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


def test_roles_that_are_not_mapped_are_refused() -> None:
    tokenizer = sloth_backend.get_chat_template(tiny.make_tokenizer(), "chatml", mapping=SHAREGPT)
    with pytest.raises(TemplateError, match="knows no role bot"):
        tokenizer.apply_chat_template([{"from": "bot", "value": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"from": "role"}, "mapping names 'from'; it may name role, content, system, user, assistant"),
        ({"user": "gpt", "assistant": "gpt"}, "gives the name 'gpt' to two of"),
        ({"user": "assistant"}, "gives the name 'assistant' to two of"),
        ({"role": ""}, "gives 'role' the name ''"),
        ({"role": 3}, "gives 'role' the name 3: expected a text"),
        ({"role": "content"}, "gives the name 'content' to two of"),
    ],
)
def test_mappings_that_cannot_be_meant(mapping: dict[str, Any], message: str) -> None:
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(SlothConfigError, match=message):
        sloth_backend.get_chat_template(tokenizer, "mistral", mapping=mapping)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
