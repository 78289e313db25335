"""Models whose labels are no next tokens: their micro-batches are the host's, and so are their losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.trl_runs import lora
from integration_tests.plugins.batch_fusion.trainers import TOKENIZER, assert_same, findings, rows, run
from sloth_plugins.batch_fusion.next_tokens import other_labels

LENGTHS = [5, 9, 3, 12, 7, 7, 2, 11]


def llama(**options: Any) -> Any:
    return tiny.make_model(TOKENIZER, initializer_range=0.1, **options)


def tagger() -> Any:
    return LlamaForTokenClassification(llama(num_labels=320).config)


def classifier() -> Any:
    return LlamaForSequenceClassification(llama(num_labels=2).config)


def translator() -> Any:
    sizes: Any = {
        "decoder_start_token_id": 0,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=320, **sizes))


def masked() -> Any:
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=320, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes))


def decoder() -> Any:
    sizes: Any = {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    return transformers.BartForCausalLM(transformers.BartConfig(vocab_size=320, dropout=0.0, **sizes))


def unshifted(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """A loss of the user's."""
    return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


def with_own_loss() -> Any:
    model = llama()
    model.loss_function = unshifted
    return model


MODELS = {
    "tagger": (tagger, "no output embeddings"),
    "classifier": (classifier, "no output embeddings"),
    "translator": (translator, "encoder-decoder"),
    "masked": (masked, "does not call self.loss_function"),
    "decoder": (decoder, "does not call self.loss_function"),
    "own loss": (with_own_loss, "is unshifted, not ForCausalLMLoss"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_labels_are_is_read_from_the_model(name: str) -> None:
    build, why = MODELS[name]
    model = build()
    reason = other_labels(model)
    assert reason is not None
    assert why in reason
    assert type(model).__name__ in reason


def test_causal_language_models_are_known_before_and_after_they_are_changed() -> None:
    gpt2: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    assert other_labels(gpt2) is None
    model: Any = llama()
    assert other_labels(model) is None
    sloth_backend.optimize(model, config={"print_report": False})
    assert other_labels(model) is None
    adapted: Any = get_peft_model(llama(), lora())
    assert other_labels(adapted.get_base_model()) is None


COLLATORS = {
    "tagger": DataCollatorForTokenClassification(TOKENIZER),
    "classifier": DataCollatorWithPadding(TOKENIZER),
    "translator": DataCollatorForSeq2Seq(TOKENIZER),
    "own loss": DataCollatorForSeq2Seq(TOKENIZER),
}
"""Of the models that the backend can be switched on for with a trainer that knows nothing of them."""


@pytest.mark.parametrize("name", COLLATORS)
def test_their_losses_and_gradients_are_the_hosts(name: str, tmp_path: Path) -> None:
    build, why = MODELS[name]
    torch.manual_seed(0)
    model = build()
    data = rows(LENGTHS, trained=lambda i, at: True)
    if name == "classifier":
        data = [{**row, "labels": i % 2} for i, row in enumerate(data)]
    mine, stock = (
        run(tmp_path, copy.deepcopy(model), data, options, data_collator=COLLATORS[name])
        for options in ({"kernels": False}, None)
    )
    (reason,) = findings(mine[0].model)
    assert reason.startswith("labels may not be next tokens")
    assert why in reason
    assert mine[1].passes == stock[1].passes == 8
    assert_same(mine, stock)
