"""Tokenizer healing as a plugin: what it takes, what it leaves alone, its order, and its way through the phases."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import (
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
)

from integration_tests import tiny
from integration_tests.plugins.tokenizer_healing.common import BASE, byte_level, heal
from sloth_plugins import tokenizer_healing


class Processor(ProcessorMixin):
    """A processor without parts."""

    def __init__(self) -> None:
        pass


def remote(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer as if its class came from a model's repository."""
    module = "transformers_modules.someone.tokenization"
    tokenizer.__class__ = type("Remote", (PreTrainedTokenizerFast,), {"__module__": module})
    return tokenizer


@pytest.mark.parametrize(
    ("make", "word"),
    [(Processor, "processor"), (object, "no tokenizers backend"), (lambda: remote(byte_level(**BASE)), "repository")],
)
def test_unknown_kinds_are_skipped_with_a_finding(make: Callable[[], Any], word: str) -> None:
    [finding] = heal(make())
    assert (finding.action, finding.subject) == ("skipped", "tokenizer")
    assert word in finding.reason


def test_switched_off() -> None:
    tokenizer = byte_level(**BASE)
    assert heal(tokenizer, heal_tokenizer=False) == []
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("kind", [Qwen2Tokenizer, GPT2Tokenizer])
def test_healthy_classes_of_transformers(kind: Any) -> None:
    model = json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    names = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "bos_token": "<|bos|>", "unk_token": "<|eos|>"}
    assert heal(kind(vocab=model["vocab"], merges=merges, **names)) == []


def test_healthy_tiny_tokenizer() -> None:
    assert heal(tiny.make_tokenizer()) == []


def test_order_of_the_faults() -> None:
    names = [fault.__module__.rsplit(".", 1)[-1] for fault in tokenizer_healing.FAULTS]
    assert names == [
        "truth",
        "ranked_truth",
        "special_tokens",
        "pad_token",
        "added_tokens",
        "chat_template",
        "doubled",
        "round_trip",
    ]
