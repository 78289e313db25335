"""Hosts that take a mean of each micro-batch: passes of several give the mean of those means, and its gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from integration_tests import tiny
from integration_tests.hosts.trl_runs import lora
from integration_tests.plugins.batch_fusion.trainers import ARGS, TOKENIZER, assert_same, findings, rows, run
from sloth_backend.findings import Edits
from sloth_kernels.registry import OP_NAMES
from sloth_plugins.batch_fusion.means import Means
from sloth_plugins.batch_fusion.rows import Share

UNEQUAL = [3, 4, 60, 9, 3, 12, 7, 2] * 2
"""So are the numbers of trained tokens: a sum over all of them would give other gradients."""


def llama(adapters: bool = True, **options: Any) -> Any:
    """A model that says it does not take ``num_items_in_batch``."""
    model: Any = tiny.make_model(TOKENIZER, initializer_range=0.1, **options)
    model.accepts_loss_kwargs = False
    return get_peft_model(model, lora(init_lora_weights=False)) if adapters else model


def compared(folder: Path, model: Any, data: Any, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """The same run with the backend, with micro-batches one by one, and without; all gradients have to be the same.

    Returns the first trainer, how often it called the model, and how often it is called without the backend.
    """
    ways = ({**(config or {})}, {**(config or {}), "accumulation": "host"}, None)
    mine, alone, stock = (
        run(folder, copy.deepcopy(model), data, how, args=TrainingArguments(str(folder), **{**ARGS, **options}))
        for how in ways
    )
    assert not mine[0].model_accepts_loss_kwargs
    assert_same(mine, alone)
    assert_same(mine, stock, 1e-5)
    return mine[0], mine[1].passes, stock[1].passes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_of_several_micro_batches_gives_the_mean_of_their_means(checkpointing: bool, tmp_path: Path) -> None:
    trainer, passes, stock = compared(tmp_path, llama(), rows(UNEQUAL), gradient_checkpointing=checkpointing)
    assert not findings(trainer.model)
    assert passes == 2
    assert stock == 8


def test_what_is_logged_is_the_mean_of_means(tmp_path: Path) -> None:
    trainer, *_ = compared(tmp_path, llama(), rows(UNEQUAL))
    summed = llama()
    del summed.get_base_model().accepts_loss_kwargs
    other, _ = run(tmp_path, summed, rows(UNEQUAL), None)
    means, sums = (t.state.log_history[0]["loss"] for t in (trainer, other))
    assert abs(means - sums) > 1e-3 * sums, "sums over all tokens would not be told from means"


def test_logits_that_are_computed_are_told_apart_too(tmp_path: Path) -> None:
    kernels = [name for name in OP_NAMES if name != "linear_cross_entropy"]
    _, passes, _ = compared(tmp_path, llama(), rows(UNEQUAL), {"kernels": kernels})
    assert passes == 2


def test_an_incomplete_last_step(tmp_path: Path) -> None:
    assert compared(tmp_path, llama(), rows(UNEQUAL[:12]))[1:] == (2, 6)


def test_a_trained_head_has_one_micro_batch_at_a_time(tmp_path: Path) -> None:
    trainer, *passes = compared(tmp_path, llama(adapters=False), rows(UNEQUAL))
    (reason,) = findings(trainer.model, "changed")
    assert reason.startswith("each micro-batch passes without padding")
    assert passes == [8, 8]


def test_a_micro_batch_without_a_trained_token_is_the_hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rows(UNEQUAL, trained=lambda i, at: i > 1 and at > 0)
    _, *passes = compared(tmp_path, llama(), data, train_sampling_strategy="sequential")
    assert "it trains no token" in caplog.text
    assert passes == [5, 8]


def test_a_model_that_does_not_ask_for_its_loss_is_told_of() -> None:
    model, means = tiny.make_model(TOKENIZER), Means()
    means.install(model, Edits())
    with pytest.raises(RuntimeError, match=r"without self\.loss_function"), means.of([Share(3, 2)]):
        model(torch.tensor([[5, 6, 7]]))


def test_outside_of_passes_the_loss_is_the_models() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model, means, edits = tiny.make_model(TOKENIZER), Means(), Edits()
    before = model(ids, labels=ids).loss
    means.install(model, edits)
    assert torch.equal(model(ids, labels=ids).loss, before)
    edits.rollback()
    assert "_loss_function" not in vars(model)
