"""Faults between a tokenizer and its model: where generation ends, the side of padding, tokens without rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from integration_tests import tiny
from integration_tests.plugins.tokenizer_healing.common import BASE, actions, byte_level, heal_with, state
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_plugins import tokenizer_healing

END, EOS = 4, 2
GENERATION = "model.generation_config.eos_token_id"


def about(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (EOS, [END, EOS]),
        (None, [END, EOS]),
        (7, [END, EOS, 7]),
        ([EOS, 7], [END, EOS, 7]),
        (END, [EOS, END]),
        ([END, EOS], None),
        ([EOS, END, 7], None),
        ([END, EOS, 100000], [END, EOS]),
        (100000, [END, EOS]),
    ],
)
def test_generation_ends_where_answers_end(before: Any, after: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    model.generation_config.eos_token_id = before
    edits = Edits()
    found = about(heal_with(model, tokenizer, edits), GENERATION)
    assert model.generation_config.eos_token_id == (before if after is None else after)
    if after is None:
        assert found == []
        return
    [finding] = found
    assert finding.action == "changed"
    assert f"was {before}; now {after}" in finding.reason
    assert ("beyond the embedding" in finding.reason) is ("100000" in str(before))
    assert heal_with(model, tokenizer) == []
    edits.rollback()
    assert model.generation_config.eos_token_id == before


def test_without_a_template_generation_ends_at_eos() -> None:
    tokenizer = byte_level(pad_token="<pad>", **BASE)
    model = tiny.make_model(tokenizer, eos_token_id=5)
    [finding] = about(heal_with(model, tokenizer), GENERATION)
    assert "the tokenizer's eos is '</s>'" in finding.reason
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 5]


def test_a_generation_that_ran_on_ends() -> None:
    tokenizer = tiny.make_tokenizer()
    model: Any = tiny.make_model(tokenizer)
    model.generation_config.eos_token_id = EOS
    with torch.no_grad():  # whatever comes in, the end of the turn comes out
        model.model.norm.weight.fill_(0)
        model.lm_head = torch.nn.Linear(32, len(tokenizer))
        model.lm_head.weight.fill_(0)
        model.lm_head.bias.copy_(torch.eye(len(tokenizer))[END])
    prompt = torch.tensor([[7, 8, 9]])
    assert model.generate(prompt, max_new_tokens=9, do_sample=False).shape[1] == 12
    heal_with(model, tokenizer)
    assert model.generate(prompt, max_new_tokens=9, do_sample=False).shape[1] == 4


def gpt2(tokenizer: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2))


def opt(tokenizer: Any) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return OPTForCausalLM(config)


def loss(model: Any, tokenizer: Any, side: str) -> float:
    """The loss of rows of different lengths, padded on ``side``, as a loop of one's own computes it."""
    tokenizer.padding_side = side
    batch = tokenizer(["the quick brown fox", "a", "the lazy dog sleeps all day long"], padding=True)
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    mask = batch["attention_mask"]
    first = mask.cumsum(dim=1) == 1  # with padding on the left this one alone has something before it, a pad token
    labels = batch["input_ids"].masked_fill((mask == 0) | first, -100)
    return model.eval()(**batch, labels=labels).loss.item()


@pytest.mark.parametrize(("make", "shifts"), [(tiny.make_model, False), (opt, False), (gpt2, True)])
@pytest.mark.parametrize(("host", "action"), [("axolotl", "changed"), ("user", "warned"), ("trl", None)])
def test_left_padding_is_a_fault_where_it_changes_the_loss(
    make: Any, shifts: bool, host: str, action: str | None
) -> None:
    tokenizer = tiny.make_tokenizer()
    model = make(tokenizer)
    right, left = loss(model, tokenizer, "right"), loss(model, tokenizer, "left")
    assert (abs(right - left) > 1e-4) is shifts
    edits = Edits()
    findings = tokenizer_healing.sloth_fix_embeddings(model, tokenizer, Run(host, SlothConfig()), edits) or []
    assert actions(about(findings, "tokenizer.padding_side")) == (
        {"tokenizer.padding_side": action} if shifts and action else {}
    )
    assert tokenizer.padding_side == ("right" if shifts and action == "changed" else "left")
    edits.rollback()
    assert tokenizer.padding_side == "left"


def with_placeholders(*tokens: str) -> tuple[Any, Any]:
    """A tokenizer that was given tokens, and its model, which was not."""
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    return tokenizer, model


def test_placeholders_without_rows_are_taken_out(tmp_path: Path) -> None:
    tokenizer, model = with_placeholders("<|reserved_special_token_0|>", "[PAD]", "<unused3>")
    before, rows, edits = state(tokenizer), model.config.vocab_size, Edits()
    assert max(tokenizer("x [PAD]").input_ids) >= rows  # an index error in the first step that meets it
    [finding] = heal_with(model, tokenizer, edits)
    assert (finding.action, finding.subject) == ("changed", "tokenizer.vocab")
    assert "had 3 placeholders" in finding.reason
    assert f"now the ids end at {rows - 1}" in finding.reason
    assert len(tokenizer) == rows
    ids = tokenizer("x [PAD] <unused3>").input_ids
    assert max(ids) < rows
    assert tokenizer.decode(ids).endswith("x [PAD] <unused3>")
    assert heal_with(model, tokenizer) == []
    tokenizer.save_pretrained(tmp_path)
    assert "[PAD]" not in (tmp_path / "tokenizer.json").read_text() + (tmp_path / "tokenizer_config.json").read_text()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == rows
    assert loaded("x [PAD]").input_ids == tokenizer("x [PAD]").input_ids
    edits.rollback()
    assert state(tokenizer) == before


def test_tokens_that_someone_may_use_are_reported_and_left() -> None:
    tokenizer, model = with_placeholders("<|tool|>", "<unused1>")
    tokenizer.chat_template = "{% for m in messages %}<unused1>{{ m['content'] }}{% endfor %}"
    found = heal_with(model, tokenizer)
    assert [finding.action for finding in about(found, "tokenizer.vocab")] == ["warned"]
    assert len(tokenizer) == model.config.vocab_size + 2
