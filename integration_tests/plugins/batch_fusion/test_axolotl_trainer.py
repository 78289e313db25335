"""Axolotl's trainer: its overrides that only hand on, its means of micro-batches, its packed rows and its counts."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import BatchSampler

pytest.importorskip("axolotl")

from axolotl.core.trainers import base as axolotl
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.trl_runs import lora
from integration_tests.plugins.batch_fusion.trainers import ARGS, TOKENIZER, assert_same, findings, rows, run
from sloth_plugins.batch_fusion.fusion import LOOP
from sloth_plugins.batch_fusion.laid import Laid
from sloth_plugins.batch_fusion.overrides import objections
from sloth_plugins.batch_fusion.rows import UnfitError, rows_of

PACKED = {
    "sample_packing": True,
    "sample_packing_drop_attention_mask": True,
}
"""What ``sample_packing: true`` and ``attn_implementation: sdpa`` in a YAML become."""
LENGTHS = [30, 4, 40, 9, 21, 12, 33, 2, 17, 28, 8, 50] * 4


class Packs(Dataset):
    """Rows by lists of numbers, a list for each packed row."""

    def __getitems__(self, keys: list[Any]) -> list[Any]:
        return [[self[i] for i in key] if isinstance(key, list) else self[key] for key in keys]


def dataset(packed: bool, **options: Any) -> Dataset:
    """Tokenised rows as Axolotl prepares them."""
    more = {"position_ids": lambda i, row: [*range(len(row))], "length": lambda i, row: len(row)} if packed else {}
    return Packs.from_list(rows(LENGTHS, attention_mask=lambda i, row: [1] * len(row), **more, **options))


class PackingTrainer(axolotl.AxolotlTrainer):
    """Batches of two rows of two documents each, in the order of the data: Axolotl's sampler takes seconds."""

    def _create_multipack_sampler(self, base_sampler: Any, dataset: Any) -> Any:
        packs: Any = [[i, i + 1] for i in range(0, len(dataset), 2)]
        return BatchSampler(packs, 2, drop_last=True)


def llama() -> Any:
    """Adapters on a model that takes packed rows."""
    return get_peft_model(tiny.make_model(TOKENIZER, initializer_range=0.1), lora(init_lora_weights=False))


def compared(folder: Path, data: Dataset, **options: Any) -> tuple[Any, tuple[int, int]]:
    """Runs with the backend, with micro-batches one by one, and without; the first trainer, and calls of the model."""
    packed = options.get("sample_packing")
    collator = (V2BatchSamplerDataCollatorForSeq2Seq if packed else DataCollatorForSeq2Seq)(
        TOKENIZER, pad_to_multiple_of=64 if packed else None
    )
    kind = PackingTrainer if packed else axolotl.AxolotlTrainer
    kept = {key: value for key, value in ARGS.items() if key != "remove_unused_columns"}
    outcomes = [
        run(
            folder, llama(), data, how, kind, data_collator=collator, processing_class=TOKENIZER,
            args=AxolotlTrainingArguments(output_dir=str(folder), **{**kept, "include_tkps": True, **options}),
        )
        for how in ({}, {"accumulation": "host"}, None)
    ]  # fmt: skip
    assert_same(outcomes[0], outcomes[1])
    assert_same(outcomes[0], outcomes[2], 1e-5)
    # Axolotl 0.19 takes means of micro-batches, 0.21 sums where the loss function takes a count.
    assert len({trainer.model_accepts_loss_kwargs for trainer, _ in outcomes}) == 1
    return outcomes[0][0], (outcomes[0][1].passes, outcomes[2][1].passes)


def test_rows_pass_together_and_tokens_are_counted_as_axolotl_counts_them(tmp_path: Path) -> None:
    trainer, passes = compared(tmp_path, dataset(packed=False, trained=lambda i, at: at >= i % 3))
    assert not findings(trainer.model)
    assert passes == (2, 8)
    assert {"tokens/total", "tokens/trainable"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("first_trained", [False, True])
def test_packed_rows_pass_together(first_trained: bool, tmp_path: Path) -> None:
    data = dataset(packed=True, trained=lambda i, at: at >= 1 - first_trained)
    trainer, passes = compared(tmp_path, data, **PACKED)
    assert not findings(trainer.model)
    assert passes == (2, 8)


def test_packed_rows_with_a_mask_are_the_hosts_and_the_finding_says_what_helps(tmp_path: Path) -> None:
    trainer, passes = compared(tmp_path, dataset(packed=True), **PACKED | {"sample_packing_drop_attention_mask": False})
    (reason,) = findings(trainer.model)
    assert "attn_implementation: sdpa" in reason
    assert passes == (8, 8)


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows of two documents and padding each, by Axolotl's collator."""
    one, two, three, four = rows([9, 12, 7, 20], trained=lambda i, at: at > 0, attention_mask=lambda i, r: [1] * len(r))
    for row in (one, two, three, four):
        row["position_ids"] = [*range(len(row["input_ids"]))]
    return dict(V2BatchSamplerDataCollatorForSeq2Seq(TOKENIZER, pad_to_multiple_of=32)([[one, two], [three, four]]))


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


def passed_alone(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is called with for a step of this batch alone."""
    laid = Laid.of([batch], [rows_of(batch)], torch.device("cpu"))
    return laid.sent(laid.parts, torch.device("cpu"))[0].inputs


def beside_another(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch, with other tokens in the first document."""
    return {**batch, "input_ids": torch.cat([batch["input_ids"][:, :7] + 9, batch["input_ids"][:, 7:]], 1)}


def test_stock_lets_documents_see_each_other_where_rows_have_a_mask() -> None:
    model, batch = tiny.make_model(TOKENIZER, initializer_range=0.1).eval(), packed_batch()
    assert batch["attention_mask"].unique().tolist() == [0, 1, 2]
    after = slice(9, 21)
    seen, hidden = batch, {name: value for name, value in batch.items() if name != "attention_mask"}
    assert not torch.allclose(logits(model, seen)[0, after], logits(model, beside_another(seen))[0, after], atol=1e-3)
    assert torch.equal(logits(model, hidden)[0, after], logits(model, beside_another(hidden))[0, after])
    with pytest.raises(UnfitError, match="does not keep the documents of a row apart"):
        rows_of(seen)


def test_documents_do_not_see_each_other_and_their_logits_are_those_of_stock() -> None:
    model, batch = tiny.make_model(TOKENIZER, initializer_range=0.1).eval(), packed_batch()
    del batch["attention_mask"]
    stock = logits(model, batch)
    ours = sloth_backend.optimize(copy.deepcopy(model), config={"print_report": False})
    laid = rows_of(batch)
    assert laid.lengths == (9, 12, 11, 7, 20, 5)
    passed, other = (logits(ours, passed_alone(b)).view_as(stock) for b in (batch, beside_another(batch)))
    torch.testing.assert_close(passed, stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(passed[0, 9:], other[0, 9:])
    assert torch.equal(passed[1, 7:], other[1, 7:])


def trainer_of(kind: Any, **options: Any) -> Any:
    trainer = object.__new__(kind)
    trainer.args = SimpleNamespace(**options)
    return trainer


def objected(kind: Any, model_type: str = "llama", **options: Any) -> list[str]:
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return [reason for name in LOOP for reason in objections(trainer_of(kind, **options), model, name)]


def test_overrides_that_are_switched_off_are_no_obstacle() -> None:
    assert objected(axolotl.AxolotlTrainer, include_tkps=True, layer_offloading=False) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layer_offloading": True}, "LayerOffloadingMixin.training_step does more"),
        ({"activation_offloading": "disk"}, "ActivationOffloadingMixin.training_step does more"),
        ({"orpo_alpha": 0.1}, "AxolotlTrainer.compute_loss does more than the Trainer's with orpo_alpha=0.1"),
        ({"model_type": "gemma4_text"}, "adds inputs for models of the type 'gemma4_text'"),
    ],
)
def test_overrides_that_do_something_are_named(options: dict[str, Any], why: str) -> None:
    (reason,) = objected(axolotl.AxolotlTrainer, **options)
    assert why in reason


def test_other_classes_and_other_versions_of_known_ones_are_not_trusted() -> None:
    class Own(axolotl.AxolotlTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class AxolotlTrainer(axolotl.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().compute_loss(*args, **kwargs)
            return loss.sqrt()

    AxolotlTrainer.__module__ = "axolotl.core.trainers.base"
    assert objected(Own) == ["Own has a compute_loss of its own"]
    assert objected(AxolotlTrainer) == ["AxolotlTrainer has a compute_loss of its own"]
