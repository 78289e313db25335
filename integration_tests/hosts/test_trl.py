"""The switch in TRL: every way to say it, the same numbers as without it, and all of it taken back on request."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration_tests import tiny
from integration_tests.hosts.conftest import Recorder
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer import sft_trainer

import sloth_backend
from sloth_backend import SlothConfig, SlothConfigError, SlothPluginError

STEPS = 4
KINDS = ["text", "prompt_completion", "messages", "prompt_completion_messages"]
CLOCKS = ("runtime", "per_second")
ALL = ["check", "heal", "fix", "patch"]


def make_args(folder: Path, **options: Any) -> SFTConfig:
    """Four steps of two passes each, in float32 on the CPU."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "save_strategy": "no",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    return SFTConfig(str(folder), **{**defaults, **options})


def make_trainer(
    folder: Path, kind: str = "text", model: Any = None, args: SFTConfig | None = None, **options: Any
) -> SFTTrainer:
    """A trainer of a fresh tiny model, unless ``model`` is given."""
    tokenizer = tiny.make_tokenizer()
    options.setdefault("processing_class", tokenizer)
    options.setdefault("train_dataset", tiny.make_dataset(kind))
    return SFTTrainer(model or tiny.make_model(tokenizer), args or make_args(folder), **options)


def logs(trainer: SFTTrainer) -> list[dict[str, float]]:
    """What the trainer has logged, without what a clock told."""
    return [{k: v for k, v in log.items() if not k.endswith(CLOCKS)} for log in trainer.state.log_history]


def assert_same_logs(ours: SFTTrainer, stock: SFTTrainer) -> None:
    """Losses within 1e-5, all else that TRL logs within 1e-4, relative: float32 summed in another order."""
    assert len(logs(ours)) == len(logs(stock)) > STEPS
    for mine, theirs in zip(logs(ours), logs(stock), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
        losses = [key for key in theirs if key.endswith("loss")]
        assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=1e-5)
    assert {"loss", "entropy", "num_tokens", "mean_token_accuracy"} <= logs(ours)[0].keys()


def fused(trainer: SFTTrainer) -> bool:
    """Whether a plugin computes the loss."""
    return bool(sloth_backend.report(trainer.model).of(action="changed", capability="linear_cross_entropy"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``stock(kind, how)``: a trainer that has run without the switch, made once."""

    @functools.cache
    def train(kind: str, how: str) -> SFTTrainer:
        trainer = make_trainer(tmp_path_factory.mktemp("stock"), kind, **HOW[how](None))
        trainer.train()
        return trainer

    return train


def peft_model(_: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": get_peft_model(tiny.make_model(tiny.make_tokenizer()), _lora())}


def _lora(**options: Any) -> LoraConfig:
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **targets, **options})


HOW: dict[str, Any] = {
    "loaded": lambda folder: {},
    "peft_config": lambda folder: {"peft_config": _lora()},
    "peft_model": peft_model,
    "all_weights_and_lora": lambda folder: {"peft_config": _lora(modules_to_save=["lm_head"])},
}


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "loaded") for kind in KINDS), *(("text", how) for how in list(HOW)[1:])]
)
def test_losses_and_metrics_are_those_of_trl(kind: str, how: str, stock: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind, backend="sloth", **HOW[how](None))
    trainer.train()
    assert fused(trainer)
    assert_same_logs(trainer, stock(kind, how))


def test_a_model_given_by_name_trains_as_it_does_in_trl(model_folder: Path, tmp_path: Path) -> None:
    trainers = []
    for backend in (None, "sloth"):
        options = {"model": str(model_folder), "processing_class": None, "peft_config": _lora()}
        trainers.append(make_trainer(tmp_path, "prompt_completion", backend=backend, **options))
        trainers[-1].train()
    assert fused(trainers[1])
    assert_same_logs(trainers[1], trainers[0])
