"""A fused step of TRL's trainer on a GPU: the host waits for nothing in it, and logs what it logs when it waits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.trl_runs import CLOCKS, OWN_HEAD, lora
from sloth_plugins.batch_fusion import bookkeeping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(OWN_HEAD, reason="this TRL computes the loss in a head of its own, which counts on the device"),
]
WARM = 3
"""Steps in which kernels are looked for; no length of a pass is new after them."""
STEPS = 6


def make_trainer(folder: Path, **config: Any) -> SFTTrainer:
    """``config``: options of the backend."""
    tokenizer = tiny.make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to("cuda", torch.bfloat16)
    lengths = [40, 23, 61, 12, 33, 50, 17, 20]
    rows = [[5 + (7 * i + at) % 200 for at in range(n)] for i, n in enumerate(lengths)]
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": STEPS, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": True}
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **steps, **quiet, gradient_checkpointing=False, learning_rate=1e-3),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=tokenizer,
        peft_config=lora(),
        backend={"print_report": False, "accumulation": "fused", **config},
    )


def watch(trainer: SFTTrainer) -> list[str]:
    """Where the host waits in steps that are not the first: the lines, with torch's words."""
    step, waits = trainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step < WARM:
            return step(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.extend(f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "synchroniz" in str(w.message))

    trainer.training_step = training_step  # type: ignore[method-assign]
    return waits


def run(folder: Path) -> tuple[SFTTrainer, list[str]]:
    trainer = make_trainer(folder)
    waits = watch(trainer)
    trainer.train()
    return trainer, waits


def test_the_host_waits_for_nothing_in_a_step_and_logs_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, waits = run(tmp_path / "late")
    assert not waits, "\n".join(waits)
    monkeypatch.setattr(bookkeeping, "DEVICES", ())
    waiting, waits = run(tmp_path / "waiting")
    assert waits  # what the first run is told apart by
    assert repr(trainer._total_train_tokens) == repr(waiting._total_train_tokens)
    assert len(trainer.state.log_history) == len(waiting.state.log_history) == STEPS + 1
    for log, theirs in zip(trainer.state.log_history, waiting.state.log_history, strict=True):
        assert {key: type(value) for key, value in log.items()} == {key: type(value) for key, value in theirs.items()}
        for key in (key for key in theirs if not key.endswith(CLOCKS)):
            assert log[key] == pytest.approx(theirs[key], rel=2e-2), key  # backward adds in no fixed order
    first, theirs = trainer.state.log_history[0], waiting.state.log_history[0]
    for key in ("loss", "entropy", "num_tokens", "mean_token_accuracy"):
        assert first[key] == theirs[key], key


def test_two_runs_of_recorded_passes_are_equal_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        trainer = make_trainer(tmp_path / name, deterministic=True)
        trainer.train()
        said = [finding.subject for finding in sloth_backend.report(trainer.model).findings]
        assert "short passes" in said
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        runs.append((losses, weights))
        sloth_backend.undo(trainer.model)
    (losses, weights), (again, others) = runs
    assert losses == again
    assert all(torch.equal(weights[name], others[name]) for name in weights)
