"""What shows once the model is there: ids beyond its embedding, and its own pad id."""

from __future__ import annotations

import copy

from integration_tests import tiny
from integration_tests.plugins.tokenizer_healing.common import actions, heal_with
from sloth_backend.findings import Edits


def test_ids_beyond_the_embedding() -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    assert heal_with(model, tokenizer) == []
    tokenizer.add_special_tokens({"eos_token": "<|stop|>", "extra_special_tokens": ["<|tool|>"]})
    [finding] = heal_with(model, tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.vocab")
    assert "eos_token '<|stop|>'" in finding.reason
    assert f"resize_token_embeddings({len(tokenizer)})" in finding.reason
    model.resize_token_embeddings(len(tokenizer))
    assert actions(heal_with(model, tokenizer)) == {"model.generation_config.eos_token_id": "changed"}
    assert heal_with(model, tokenizer) == []


def test_pad_beyond_the_embedding_is_chosen_again() -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    edits = Edits()
    found = actions(heal_with(model, tokenizer, edits))
    assert found["tokenizer.pad_token"] == "changed"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id < model.config.vocab_size
    edits.rollback()
    assert tokenizer.pad_token == "<pad>"


def test_configs_learn_the_pad_id() -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, pad_token_id=None)
    before = copy.deepcopy((vars(model.config), vars(model.generation_config)))
    edits = Edits()
    found = heal_with(model, tokenizer, edits)
    assert [f.subject for f in found] == ["model.config.pad_token_id", "model.generation_config.pad_token_id"]
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert heal_with(model, tokenizer) == []
    edits.rollback()
    assert (vars(model.config), vars(model.generation_config)) == before


def test_embedding_inside_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(model, config)
    assert heal_with(model, tokenizer) == []
    tokenizer.add_tokens(["<|tool|>"])
    assert actions(heal_with(model, tokenizer)) == {"tokenizer.vocab": "warned"}
