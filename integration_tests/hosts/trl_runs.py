"""Short runs of TRL on tiny models, and how to compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

import sloth_backend
from integration_tests import tiny

STEPS = 4
CLOCKS = ("runtime", "per_second")
"""How the names of logged values end that a clock told."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN_HEAD = hasattr(sft_trainer, "add_fused_lm_head")
"""TRL 1.16 computes the loss in a fused head of its own; before, it patched the model's forward."""


DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
"""Steps of two passes each, in float32 on the CPU."""


def make_args(folder: Path, **options: Any) -> SFTConfig:
    """Four steps of two passes each, in float32 on the CPU."""
    return SFTConfig(str(folder), **{**DEFAULTS, "max_steps": STEPS, **options})


def make_trainer(
    folder: Path, kind: str = "text", model: Any = None, args: SFTConfig | None = None, **options: Any
) -> SFTTrainer:
    """A trainer of a fresh tiny model, unless ``model`` is given."""
    tokenizer = tiny.make_tokenizer()
    options.setdefault("processing_class", tokenizer)
    options.setdefault("train_dataset", tiny.make_dataset(kind))
    model = model or tiny.make_model(tokenizer)
    torch.manual_seed(0)  # PEFT draws its adapters inside
    return SFTTrainer(model, args or make_args(folder), **options)


def logs(trainer: SFTTrainer) -> list[dict[str, float]]:
    """What the trainer has logged of its training, without what a clock told."""
    history = [log for log in trainer.state.log_history if "eval_loss" not in log]
    return [{k: v for k, v in log.items() if not k.endswith(CLOCKS)} for log in history]


def assert_same_logs(ours: SFTTrainer, stock: SFTTrainer) -> None:
    """Losses within 1e-5, all else that TRL logs within 1e-4, relative: float32 summed in another order."""
    assert len(logs(ours)) == len(logs(stock)) > STEPS
    for mine, theirs in zip(logs(ours), logs(stock), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
        losses = [key for key in theirs if key.endswith("loss")]
        assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=1e-5)
    assert {"loss", "entropy", "num_tokens", "mean_token_accuracy"} <= logs(ours)[0].keys()


def assert_kernels_in_place(trainer: SFTTrainer) -> None:
    """Modules run on our ops, and so does the loss, but where TRL brings a fused head of its own."""
    report = sloth_backend.report(trainer.model)
    assert report.of(action="changed", capability="rms_norm"), str(report)
    assert bool(report.of(action="changed", capability="linear_cross_entropy")) is not OWN_HEAD, str(report)


def lora(**options: Any) -> LoraConfig:
    """LoRA on all linear layers but the head."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LINEARS, **options})


def lora_model() -> Any:
    """A tiny model that carries LoRA already."""
    model = tiny.make_model(tiny.make_tokenizer())
    return get_peft_model(model, lora())


HOW: dict[str, Any] = {
    "loaded": dict,
    "peft_config": lambda: {"peft_config": lora()},
    "peft_model": lambda: {"model": lora_model()},
    "trained_head": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
}
"""Ways to hand a model over, as arguments of ``make_trainer``."""
