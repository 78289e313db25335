"""Each host's data come from the healed tokenizer: a faulty one is mended before the host encodes anything with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import processors
from transformers import AutoTokenizer

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.accelerate_runs import make_accelerator, make_batches, make_model
from integration_tests.hosts.trl_runs import make_trainer

PAD, BOS, EOS, END = 0, 1, 2, 4
MENDED = {"tokenizer.pad_token", "tokenizer.post_processor", "model.generation_config.eos_token_id"}
"""What healing says about ``faulty`` and its model."""


def faulty() -> Any:
    """A tokenizer whose pad is eos and whose post-processor adds bos twice."""
    tokenizer = tiny.make_tokenizer()
    twice = processors.TemplateProcessing(single="<|bos|> <|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    tokenizer.backend_tokenizer.post_processor = twice
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer("x").input_ids[:2] == [BOS, BOS]
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that generates past its answers, with the faulty tokenizer."""
    tokenizer = faulty()
    model = tiny.make_model(tokenizer)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def mended(model: Any) -> set[str]:
    """What healing changed on the way to this model."""
    return {f.subject for f in sloth_backend.report(model).of(action="changed", capability="tokenizer_healing")}


@pytest.mark.parametrize("by_name", [True, False])
def test_trl(folder: Path, tmp_path: Path, by_name: bool) -> None:
    options: dict[str, Any] = {"model": str(folder), "processing_class": None}
    if not by_name:
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        options = {"model": model, "processing_class": AutoTokenizer.from_pretrained(folder)}
    stock = make_trainer(tmp_path / "stock", **options)
    assert all(row["input_ids"][:2] == [BOS, BOS] for row in stock.train_dataset)
    trainer = make_trainer(tmp_path / "ours", backend="sloth", **options)
    assert mended(trainer.model) >= MENDED
    assert all(row["input_ids"].count(BOS) == 1 for row in trainer.train_dataset)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["input_ids"][batch["labels"] == -100].tolist()) <= {PAD}
    assert trainer.processing_class.pad_token_id == trainer.model.config.pad_token_id == PAD
    assert trainer.model.generation_config.eos_token_id == [END, EOS]


def test_axolotl(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    from integration_tests.hosts import axolotl_runs

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': text})}\n" for text in tiny.sentences(12)))
    given = {
        **axolotl_runs.options(tmp_path, folder, **axolotl_runs.STOCK),
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }
    stock = axolotl_runs.data(axolotl_runs.load(given)).train_dataset
    assert all(row["input_ids"][:2] == [BOS, BOS] for row in stock)
    run = axolotl_runs.train({**given, "use_sloth": True})
    assert mended(run.model) >= MENDED
    assert all(row["input_ids"].count(BOS) == 1 for row in run.trainer.train_dataset)
    assert run.tokenizer.pad_token_id == PAD


def test_accelerate() -> None:
    tokenizer, model = faulty(), make_model()
    model.generation_config.eos_token_id = EOS
    accelerator = sloth_backend.attach(make_accelerator(), tokenizer)
    batches = make_batches(tokenizer=tokenizer)
    model, batches = accelerator.prepare(model, batches)
    assert mended(model) >= MENDED
    for batch in batches:
        assert (batch["input_ids"] == BOS).sum(dim=1).tolist() == [1, 1]
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) <= {PAD}
    sloth_backend.undo(model)
    assert tokenizer("x").input_ids[:2] == [BOS, BOS]
    assert tokenizer.pad_token_id == EOS


def plain_trainer(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    """A Trainer whose rows the tokenizer has made as it is."""
    args = transformers.TrainingArguments(str(folder), use_cpu=True, report_to="none")
    rows = [dict(tokenizer(text)) for text in tiny.sentences(4)]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    given: Any = {"processing_class": tokenizer, "data_collator": collator, "backend": "sloth", **options}
    return transformers.Trainer(model, args, train_dataset=rows, **given)  # pyright: ignore[reportArgumentType]


def test_transformers_trainer(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), transformers.LlamaForCausalLM.from_pretrained(folder)
    trainer = plain_trainer(model, tokenizer, tmp_path)
    assert mended(trainer.model) >= MENDED
    assert trainer.processing_class is tokenizer
    assert tokenizer("x").input_ids.count(BOS) == 1
    assert trainer.model.config.pad_token_id == tokenizer.pad_token_id == PAD
    assert trainer.model.generation_config.eos_token_id == [END, EOS]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["input_ids"][batch["labels"] == -100].tolist()) <= {PAD}
    [warned] = sloth_backend.report(trainer.model).of(action="warned", capability="tokenizer_healing")
    assert warned.subject == "train_dataset"
    assert "tokenizer.post_processor changed after the rows were tokenised" in warned.reason
    sloth_backend.undo(trainer.model)
    assert tokenizer("x").input_ids[:2] == [BOS, BOS]
    assert tokenizer.pad_token_id == EOS


def test_transformers_trainer_of_a_healthy_tokenizer_without_one_and_of_other_models(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    trainer = plain_trainer(tiny.make_model(tokenizer), tokenizer, tmp_path)
    assert not sloth_backend.report(trainer.model).of(action="warned", capability="tokenizer_healing")
    broken, model = faulty(), tiny.make_model(tokenizer)
    scoring = transformers.LlamaForSequenceClassification(model.config)
    for options in ({"processing_class": None}, {"model": scoring}, {"backend": {"heal_tokenizer": False}}):
        given = {"model": model, **options}
        trainer = plain_trainer(given.pop("model"), broken, tmp_path, **given)
        assert broken("x").input_ids[:2] == [BOS, BOS]
        assert not mended(trainer.model)
        sloth_backend.undo(trainer.model)
