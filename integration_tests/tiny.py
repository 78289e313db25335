"""Tiny random models, tokenizers and data sets, made offline in milliseconds; shared by all tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "sloth", "hangs", "eats", "leaves", "sleeps"]
LAYERS = ["model.layers.0", "model.layers.1"]
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` sentences of 4 to 12 words."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(4, 12))) for _ in range(count)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; adds ``<|bos|>`` to plain text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sentences(200), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bpe.token_to_id("<|bos|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random float32 Llama of two layers for ``tokenizer``; ``overrides`` are fields of its config."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**options, **overrides}))
    if "<|im_end|>" in (tokenizer.chat_template or ""):  # what ends an answer ends generation
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    return model


def save(folder: Path, **overrides: Any) -> Path:
    """Write a model and its tokenizer to ``folder``, ready for ``from_pretrained``; returns ``folder``."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(kind: str, count: int = 16) -> list[dict[str, Any]]:
    """Rows of one of the formats that trainers take; each question and answer is a sentence.

    Args:
        kind: ``text``, ``prompt_completion``, ``messages``, or ``prompt_completion_messages``.
        count: how many.
    """
    pairs = zip(sentences(count, seed=1), sentences(count, seed=2), strict=True)
    return [_row(kind, question, answer) for question, answer in pairs]


def _row(kind: str, question: str, answer: str) -> dict[str, Any]:
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    formats: dict[str, dict[str, Any]] = {
        "text": {"text": f"{question} {answer}"},
        "prompt_completion": {"prompt": question, "completion": f" {answer}"},
        "messages": {"messages": [user, assistant]},
        "prompt_completion_messages": {"prompt": [user], "completion": [assistant]},
    }
    return formats[kind]


def make_dataset(kind: str = "text", count: int = 16) -> Dataset:
    """``rows`` as a Dataset."""
    return Dataset.from_list(rows(kind, count))


def write_jsonl(path: Path, kind: str = "text", count: int = 16) -> Path:
    """``rows`` as a file of JSON lines; returns ``path``."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(kind, count)))
    return path


def describe(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Every instance attribute of every module, comparable between two copies of a model.

    Tensors stand for their values, functions and methods for their qualified names, other objects for their types.
    """
    return {name: {key: _describe(value) for key, value in vars(m).items()} for name, m in model.named_modules()}


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.requires_grad, value.tolist())
    if isinstance(value, torch.nn.Module):
        return type(value)
    if isinstance(value, dict):  # hooks are kept under running numbers, which say nothing
        return [(key if isinstance(key, str) else None, _describe(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(map(repr, map(_describe, value)))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    return getattr(value, "__qualname__", None) or getattr(value, "__func__", type(value)).__qualname__
