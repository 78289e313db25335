"""Every template against its documented format, against the authors' own renderers, and its assistant masks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import PreTrainedTokenizerFast

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.chat_templates.fixtures import CARDS, CONVERSATIONS, HI
from sloth_plugins.chat_templates.formats import FORMATS

NAMES = [known.name for known in FORMATS]
TRL = Path(trl.__file__).parent / "chat_templates"
ORIGINALS = {
    "llama-3": "llama3",
    "llama-3.1": "llama3_1",
    "qwen-2.5": "qwen2_5",
    "phi-3": "phi3",
    "gemma-2": "gemma",
    "gemma-3": "gemma3",
}
"""Templates of the model cards, of which TRL keeps copies."""
TEXTS = st.text(alphabet=st.sampled_from("ab <|>\n\t\"'{}é中"), max_size=12)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <numbers>.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer for each format."""
    return {name: sloth_backend.get_chat_template(tiny.make_tokenizer(), name) for name in NAMES}


def rendered(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool, **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)


def test_there_is_a_card_for_every_format() -> None:
    assert list(CARDS) == NAMES


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_as_documented(name: str, which: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer, expected = tokenizers[name], getattr(CARDS[name], which)
    if expected is None:
        with pytest.raises(TemplateError, match="no system message"):
            rendered(tokenizer, CONVERSATIONS[which], prompt=True)
        return
    names = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
    for mark, token in names.items():
        expected = expected.replace(mark, token)
    assert rendered(tokenizer, CONVERSATIONS[which], prompt=which != "ended") == expected


def conversations(system: bool) -> st.SearchStrategy[list[dict[str, str]]]:
    """Questions and answers in turn, after a system message or not."""
    turns = st.lists(TEXTS, min_size=1, max_size=5).map(
        lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    )
    first = TEXTS.map(lambda text: [{"role": "system", "content": text}])
    return st.tuples(first if system else st.just([]), turns).map(lambda parts: parts[0] + parts[1])


@pytest.mark.parametrize("name", ORIGINALS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), prompt=st.booleans())
def test_as_the_authors_template(
    name: str, data: st.DataObject, prompt: bool, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    messages = data.draw(conversations(system=name != "gemma-2" and data.draw(st.booleans())))
    original = (TRL / f"{ORIGINALS[name]}.jinja").read_text()
    expected = rendered(tokenizers[name], messages, prompt, chat_template=original)
    assert rendered(tokenizers[name], messages, prompt) == expected


@pytest.mark.parametrize("name", ["llama-3.1", "qwen-2.5"])
@pytest.mark.parametrize("content", ["", "Let me see."])
def test_tools_as_the_authors_template(name: str, content: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        *CONVERSATIONS["turns"],
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 3."},
    ]
    original = (TRL / f"{ORIGINALS[name]}.jinja").read_text()
    for tools in (None, [TOOL], [TOOL, TOOL]):
        for count in range(2, len(messages) + 1):
            some = messages[:count]
            expected = rendered(tokenizers[name], some, True, tools=tools, chat_template=original)
            assert rendered(tokenizers[name], some, True, tools=tools) == expected


def test_gemma_3_takes_parts(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": " What is it? "}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    original = (TRL / "gemma3.jinja").read_text()
    expected = rendered(tokenizers["gemma-3"], messages, False, chat_template=original)
    assert rendered(tokenizers["gemma-3"], messages, False) == expected


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mistral-v1", functools.cache(MistralTokenizer.v1)),
        ("mistral-v3", functools.cache(MistralTokenizer.v2)),
        ("mistral-v3", functools.cache(MistralTokenizer.v3)),
        ("mistral-v7", functools.cache(MistralTokenizer.v7)),
    ],
)
def test_as_mistral_common(
    name: str, make: Any, turns: int, system: bool, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """The text that Mistral's own library encodes: pieces with U+2581 for spaces, line ends as bytes."""
    texts = ["What is 2 + 2?", "It is 4.", "And 3 + 3?", "That is 6.", "Thanks!"][:turns]
    theirs = [(UserMessage, AssistantMessage)[i % 2](content=text) for i, text in enumerate(texts)]
    ours = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        theirs, ours = [SystemMessage(content="Sums."), *theirs], [{"role": "system", "content": "Sums."}, *ours]
    expected = make().encode_chat_completion(ChatCompletionRequest(messages=theirs)).text
    expected = expected.replace("\u2581", " ").replace("<0x0A>", "\n")
    text = rendered(tokenizers[name], ours, prompt=True)
    assert text.replace("<|bos|>", "<s>").replace("<|eos|>", "</s>") == expected


def assistant_text(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """What the assistant's mask covers."""
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    ids = [number for number, masked in zip(out["input_ids"], out["assistant_masks"], strict=True) if masked]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_covers_the_answers_and_their_end(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers[name]
    stop = next(known.stop for known in FORMATS if known.name == name) or tokenizer.eos_token
    space = " " if name in ("vicuna", "mistral-v1", "mistral-v3", "mistral-v7") else ""
    messages = [*CONVERSATIONS["ended"], *CONVERSATIONS["ended"], CONVERSATIONS["prompt"][0]]
    assert assistant_text(tokenizer, messages) == f"{space}{HI}{stop}" * 2
    assert assistant_text(tokenizer, CONVERSATIONS["prompt"], add_generation_prompt=True) == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_what_comes_before_the_answer(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """A prompt at generation is a prefix of the text that was trained on, in tokens too."""
    tokenizer = tokenizers[name]
    prompt, whole = (
        tokenizer.apply_chat_template(CONVERSATIONS[which], add_generation_prompt=which == "prompt", return_dict=True)
        for which in ("prompt", "ended")
    )
    assert whole["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_a_tool_call_is_the_assistants(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [*CONVERSATIONS["prompt"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    llama = assistant_text(tokenizers["llama-3.1"], messages, tools=[TOOL])
    assert llama == '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    qwen = assistant_text(tokenizers["qwen-2.5"], messages, tools=[TOOL])
    assert qwen == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("name", [known.name for known in FORMATS if not known.knows_tools])
def test_tools_are_refused_where_the_template_would_drop_them(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(TemplateError, match="describes no tools"):
        rendered(tokenizers[name], CONVERSATIONS["prompt"], True, tools=[TOOL])


@pytest.mark.parametrize("name", NAMES)
def test_unknown_roles_are_refused(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    with pytest.raises(TemplateError, match="knows no role human"):
        rendered(tokenizers[name], [{"role": "human", "content": "Hello?"}], True)
