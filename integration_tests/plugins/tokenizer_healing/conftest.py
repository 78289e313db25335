"""Fixtures of tokenizer healing: trained SentencePiece models and a tokenizer without a fault."""

from __future__ import annotations

import importlib
import io
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests.plugins.tokenizer_healing.common import MODULES, dressed, heal


@pytest.fixture(autouse=True)
def _protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads SentencePiece files through protobuf classes that are pickier than the file format."""
    monkeypatch.setenv("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "true")


@pytest.fixture(scope="session")
def stdlib_lines() -> list[str]:
    """Lines of help texts of Python's standard library, indentation and all."""
    texts = [pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext) for name in MODULES]
    return [line for text in texts for line in text.split("\n")]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, stdlib_lines: list[str]) -> Callable[..., Path]:
    """Trains a SentencePiece model of 600 pieces, Llama's options unless told otherwise; returns the file."""

    def train(name: str = "llama", **options: Any) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"spm-{name}"
        if not (folder / "tokenizer.model").exists():
            folder.mkdir()
            out = io.BytesIO()
            llama = {
                "model_type": "bpe",
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "allow_whitespace_only_pieces": True,
            }
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(stdlib_lines[:6000]),
                model_writer=out,
                vocab_size=600,
                minloglevel=2,
                **{**llama, **options},
            )
            (folder / "tokenizer.model").write_bytes(out.getvalue())
        return folder / "tokenizer.model"

    return train


@pytest.fixture
def folder(tmp_path: Path, trained: Callable[..., Path]) -> Path:
    """A folder whose tokenizer has no fault: rebuilt from its small SentencePiece model, with a pad token, saved."""
    folder = dressed(tmp_path / "healthy", trained(), add_bos_token=True)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    heal(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def healthy(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of ``folder``."""
    return AutoTokenizer.from_pretrained(folder)
