"""The model's side: rows for added tokens, the id that ends generation, and what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.chat_templates.fixtures import CONVERSATIONS
from sloth_backend import SlothConfigError

TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def pair(rows: int | None = None, tied: bool = False) -> tuple[Any, Any]:
    """A tokenizer of 316 tokens and a model, whose rows have a mean far from 0."""
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, vocab_size=rows or len(tokenizer), tie_word_embeddings=tied)
    for matrix in matrices(model):
        matrix.data[:, 0] += 1
    return tokenizer, model


def matrices(model: Any) -> list[torch.nn.Parameter]:
    return list(
        {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values()
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rows", "resized"), [(316, 319), (318, 319), (319, 319), (320, 320), (384, 384)])
def test_new_tokens_get_the_mean_of_the_trained_rows(rows: int, resized: int, tied: bool) -> None:
    tokenizer, model = pair(rows, tied)
    untrained = 7
    for matrix in matrices(model):
        matrix.data[untrained] = 1e-23
    before = [matrix.detach().clone() for matrix in matrices(model)]
    sloth_backend.get_chat_template(tokenizer, "llama-3", model=model)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == [316, 317, 318]
    for old, new in zip(before, matrices(model), strict=True):
        assert len(new) == resized
        trained = [i for i in range(rows) if i not in (untrained, *ids)]
        mean = old[trained].double().mean(dim=0).float()
        assert torch.equal(new[trained], old[trained])
        for row in {untrained, *ids, *range(rows, resized)}:
            torch.testing.assert_close(new[row], mean, rtol=0, atol=1e-7)
    assert model.config.vocab_size == resized
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_matrix_of_whole_tiles_stays_one() -> None:
    tokenizer, model = pair(320)
    tokenizer.add_tokens([f"<new{number}>" for number in range(4)])
    sloth_backend.get_chat_template(tokenizer, "llama-3", model=model)
    assert [len(matrix) for matrix in matrices(model)] == [384, 384]


def test_nothing_is_resized_where_tokens_are_there() -> None:
    tokenizer, model = pair()
    before = [matrix.detach().clone() for matrix in matrices(model)]
    same = matrices(model)
    sloth_backend.get_chat_template(tokenizer, "chatml", model=model)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(matrices(model), same, before, strict=True))


def test_a_model_with_adapters_is_not_resized() -> None:
    tokenizer, model = pair()
    before = tokenizer.get_vocab()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SlothConfigError, match="needs 319 rows, has 316, and carries adapters"):
        sloth_backend.get_chat_template(tokenizer, "llama-3", model=model)
    assert tokenizer.get_vocab() == before
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    sloth_backend.get_chat_template(tokenizer, "chatml", model=model)


def test_a_model_without_values_is_not_resized() -> None:
    tokenizer, model = pair()
    with pytest.raises(SlothConfigError, match="meta device"):
        sloth_backend.get_chat_template(tokenizer, "llama-3", model=model.to("meta"))


@pytest.mark.parametrize(("eos", "after"), [(2, [4, 2]), ([2], [4, 2]), (None, [4, 2]), ([4, 2], [4, 2]), (4, 4)])
def test_generation_stops_at_the_end_of_a_turn(eos: Any, after: Any) -> None:
    tokenizer, model = pair()
    model.generation_config.eos_token_id = eos
    sloth_backend.get_chat_template(tokenizer, "chatml", model=model)
    assert model.generation_config.eos_token_id == after


def test_the_report_of_a_run_tells_it_and_undo_takes_the_model_back() -> None:
    tokenizer, model = pair()
    sloth_backend.get_chat_template(tokenizer, "chatml", mapping={"user": "human"})
    model.generation_config.eos_token_id = 2
    sloth_backend.optimize(model, tokenizer, {"print_report": False})
    found = sloth_backend.report(model).of(action="changed", capability="chat_templates")
    subjects = [finding.subject for finding in found]
    assert subjects == ["tokenizer.chat_template", "model.generation_config.eos_token_id"]
    assert {finding.plugin for finding in found} == {"chat_templates"}
    assert "chatml" in found[0].reason
    assert "'human'" in found[0].reason
    assert model.generation_config.eos_token_id == [4, 2]
    sloth_backend.undo(model)
    assert model.generation_config.eos_token_id == 2


def test_a_failure_on_the_model_takes_the_tokenizer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = pair()
    before = tokenizer.get_vocab()

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "resize_token_embeddings", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        sloth_backend.get_chat_template(tokenizer, "llama-3", model=model)
    assert tokenizer.get_vocab() == before
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_saved_and_loaded_together(tmp_path: Path) -> None:
    tokenizer, model = pair()
    sloth_backend.get_chat_template(tokenizer, "llama-3", model=model)
    inputs = tokenizer.apply_chat_template(CONVERSATIONS["turns"], return_tensors="pt", return_dict=True)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    inputs = again.apply_chat_template(CONVERSATIONS["turns"], return_tensors="pt", return_dict=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
