"""Data checks in every host: what each shows of its rows, and that the rows it trains on stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts import axolotl_runs
from integration_tests.hosts.accelerate_runs import make_accelerator, make_model
from integration_tests.hosts.trainer_runs import CASES, texts
from integration_tests.hosts.trl_runs import DEFAULTS, lora, make_args, make_trainer
from sloth_backend import SlothConfigError

QUIET: Any = {"print_report": False}


def said(model: Any) -> list[str]:
    """What the report says of data, without what was looked at."""
    found = sloth_backend.report(model).of(capability="data_checks")
    assert all(finding.plugin == "data_checks" for finding in found)
    return [f"{finding.subject}: {finding.reason}" for finding in found]


def tokenised(*rows: list[int]) -> Dataset:
    return Dataset.from_list([{"input_ids": row} for row in rows])


CUTS: dict[str, dict[str, Any]] = {
    "start": {"max_length": 20},
    "end": {"max_length": 20, "truncation_mode": "keep_end"},
    "packed": {"max_length": 24, "packing": True},
    "wrapped": {"max_length": 24, "packing": True, "packing_strategy": "wrapped"},
    "nowhere": {"max_length": None, "shuffle_dataset": True},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("stream", [False, True])
def test_trl_trains_on_the_rows_that_it_trains_on_without_us(cut: str, stream: bool, tmp_path: Path) -> None:
    def rows(**switch: Any) -> list[Any]:
        data = tiny.make_dataset("prompt_completion")
        data = data.to_iterable_dataset() if stream else data
        evaluation = tiny.make_dataset("prompt_completion", 4)
        args = make_args(tmp_path, **CUTS[cut])
        trainer = make_trainer(tmp_path, args=args, train_dataset=data, eval_dataset=evaluation, **switch)
        assert "_prepare_dataset" not in vars(trainer)
        assert isinstance(trainer, SFTTrainer)
        return [list(trainer.train_dataset), list(trainer.eval_dataset)]  # pyright: ignore[reportArgumentType]

    assert rows(backend=QUIET) == rows()


def test_trl_says_what_it_cuts(tmp_path: Path) -> None:
    data = tiny.make_dataset("prompt_completion")
    args = make_args(tmp_path, max_length=10)
    trainer = make_trainer(tmp_path, args=args, train_dataset=data, eval_dataset=data, backend=QUIET)
    found = said(trainer.model)
    assert [one for one in found if one.startswith("data: train")] == [
        "data: train: 16 texts of more than 10 tokens (the longest 25): they are cut at their end, "
        "134 tokens (45.6%) are lost",
        "data: train: 8 texts whose answer, all trained tokens, lies beyond that cut: they are dropped",
        "data: train: 8 texts whose answer is cut in two there: a part of its trained tokens is lost",
        "data: train: looked at all 16 rows: 294 tokens, the longest 25",
    ]
    assert len([one for one in found if one.startswith("data: eval")]) == 4
    assert len(trainer.train_dataset) == 8  # pyright: ignore[reportArgumentType]


def test_trl_does_not_start_where_nothing_would_be_learned(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    before = tiny.describe(model)
    args = make_args(tmp_path, max_length=3)
    with pytest.raises(SlothConfigError, match="no row of the train data has a trained token left"):
        make_trainer(tmp_path, "prompt_completion", model, args, processing_class=tokenizer, backend=QUIET)
    assert tiny.describe(model).keys() == before.keys()
    assert sloth_backend.report(model).findings == ()


def test_pairs_are_looked_at_before_their_collator_cuts_them(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    args = DPOConfig(str(tmp_path), **{**DEFAULTS, "max_length": 20})
    model = tiny.make_model(tokenizer)
    data = texts(CASES["DPO"].columns)
    options: Any = {"processing_class": tokenizer, "peft_config": lora(), "backend": QUIET}
    trainer = DPOTrainer(model, args=args, train_dataset=data, **options)
    found = said(trainer.model)
    assert "texts of more than 20 tokens" in found[0]
    assert "they are cut at their end" in found[0]
    assert "whose answer is cut in two there" in found[1]


def transformers_trainer(model: Any, folder: Path, data: Any, **switch: Any) -> Any:
    args = TrainingArguments(str(folder), **{**DEFAULTS, "max_steps": 1})
    collator = DataCollatorForLanguageModeling(tiny.make_tokenizer(), mlm=False)
    return Trainer(model, args, train_dataset=data, data_collator=collator, **switch)


def test_transformers_refuses_ids_that_the_model_does_not_have(tmp_path: Path) -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    with pytest.raises(SlothConfigError, match=r"1 row of the train data with ids .*999"):
        transformers_trainer(model, tmp_path, tokenised([5, 6], [5, 999]), backend=QUIET)
    trainer = transformers_trainer(model, tmp_path, tokenised([5, 6, 7], [5, 6]), backend=QUIET)
    assert said(model) == ["data: train: looked at all 2 rows: 5 tokens, the longest 3; no faults"]
    trainer.train()
    assert transformers_trainer(model, tmp_path, tokenised([5, 999]), backend={**QUIET, "check_data": False})


def test_accelerate_looks_at_the_loaders_that_are_prepared_with_or_before_the_model() -> None:
    def loader(*rows: list[int]) -> DataLoader:
        return DataLoader(tokenised(*rows).with_format("torch"), 1)  # pyright: ignore[reportArgumentType]

    accelerator, model = make_accelerator(), make_model()
    sloth_backend.attach(accelerator, config=QUIET)
    accelerator.prepare(loader([5, 6, 7]))
    model, _ = accelerator.prepare(model, loader([5, 6]))
    assert [one.partition(": looked")[0] for one in said(model)] == ["data: dataloader 1", "data: dataloader 2"]
    other = sloth_backend.attach(make_accelerator(), config=QUIET)
    with pytest.raises(SlothConfigError, match="dataloader 1 data with ids"):
        other.prepare(make_model(), loader([999]))
    labels = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}]
    assert said(other.prepare(make_model(), DataLoader(labels))[0])  # pyright: ignore[reportArgumentType]


def test_axolotl_shows_its_rows_before_it_drops_the_long_ones(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    given = axolotl_runs.options(tmp_path, model_folder, use_unsloth=True, max_steps=1)
    lengths = sorted(map(len, axolotl_runs.data(axolotl_runs.load(given)).train_dataset["input_ids"]))
    middle, prepared = lengths[24], str(tmp_path / "prepared")
    run = axolotl_runs.train({**given, "sequence_len": middle, "dataset_prepared_path": prepared})
    found = said(run.model)
    number = sum(length > middle for length in lengths)
    assert f"{number} texts of more than {middle} tokens (the longest {lengths[-1]}): they are dropped" in found[0]
    assert "looked at all 48 rows" in found[-1]
    assert len(run.trainer.train_dataset) == 48 - number
