"""Short runs of trainers other than SFT on tiny models, with the switch and without, and how to compare them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import get_peft_model
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from integration_tests import tiny
from integration_tests.hosts import trl_runs
from integration_tests.hosts.trl_runs import CLOCKS, lora

STEPS = 3
DEFAULTS = {**trl_runs.DEFAULTS, "max_steps": STEPS}


def texts(columns: dict[str, Callable[[str, str, str, int], Any]], count: int = 12) -> Dataset:
    texts = zip(*(tiny.sentences(count, seed) for seed in (1, 2, 3)), range(count), strict=True)
    return Dataset.from_list([{name: make(*text) for name, make in columns.items()} for text in texts])


PAIRS = {"prompt": lambda q, a, b, i: q, "chosen": lambda q, a, b, i: f" {a}", "rejected": lambda q, a, b, i: f" {b}"}
RATED = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": lambda q, a, b, i: i % 2 == 0}
PROMPTS = {"prompt": PAIRS["prompt"]}


def causal_model(tokenizer: Any) -> Any:
    """A Llama that predicts the next token."""
    return tiny.make_model(tokenizer)


def scoring_model(tokenizer: Any) -> Any:
    """A Llama that gives a text one score."""
    config = tiny.make_model(tokenizer).config
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config)


def reward(completions: list[str], **_: Any) -> list[float]:
    """How many different letters a completion has: what samples of a random model differ in."""
    return [float(len(set(completion))) for completion in completions]


GENERATES = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "per_device_train_batch_size": 4}


class Case(NamedTuple):
    """A trainer, what it is given, and what it logs that depends on the model."""

    trainer: Any
    config: Any
    columns: dict[str, Any]
    watched: tuple[str, ...]
    args: dict[str, Any] = {}
    options: dict[str, Any] = {}
    model: Callable[[Any], Any] = causal_model


PREFERENCES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
CASES = {
    "DPO": Case(trl.DPOTrainer, trl.DPOConfig, PAIRS, PREFERENCES),
    "KTO": Case(trl.KTOTrainer, trl.KTOConfig, RATED, ("loss", "kl", "logps/chosen")),
    "Reward": Case(trl.RewardTrainer, trl.RewardConfig, PAIRS, ("mean_reward", "margin"), model=scoring_model),
    "CPO": Case(CPOTrainer, CPOConfig, PAIRS, (*PREFERENCES, "nll_loss")),
    "ORPO": Case(ORPOTrainer, ORPOConfig, PAIRS, (*PREFERENCES, "log_odds_ratio")),
    "GRPO": Case(
        trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, ("reward", "kl", "entropy"), GENERATES, {"reward_funcs": reward}
    ),
    "RLOO": Case(
        trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, ("reward", "kl", "entropy"), GENERATES, {"reward_funcs": reward}
    ),
}
if hasattr(trl, "DistillationTrainer"):  # since TRL 1.14
    CASES["Distillation"] = Case(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        PROMPTS,
        ("loss", "entropy"),
        {"max_completion_length": 8, "per_device_train_batch_size": 4},
        {"teacher_model": lambda: tiny.make_model(tiny.make_tokenizer(), seed=1)},
    )
PAIRED = ("DPO", "KTO", "CPO", "ORPO")


def make(name: str, folder: Path, *, peft: str = "", args: dict[str, Any] | None = None, **options: Any) -> Any:
    """A trainer of a fresh tiny model.

    Args:
        name: of ``CASES``.
        folder: where its model is saved, for those that load their reference themselves, and its output goes.
        peft: ``"config"`` hands it LoRA to add, ``"model"`` a model that carries LoRA already.
        args: options of its configuration.
        options: of the trainer.
    """
    case, tokenizer = CASES[name], tiny.make_tokenizer()
    model: Any = options.pop("model", None) or case.model(tokenizer)
    if not isinstance(model, str) and not model.config._name_or_path:
        source = folder / "source"
        model.save_pretrained(source)
        model.config._name_or_path = str(source)
    kind = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    torch.manual_seed(0)
    if peft == "model":
        model = get_peft_model(model, lora(task_type=kind))
        _train_a_little(model)
    elif peft == "config":
        options["peft_config"] = lora(task_type=kind)
    config = case.config(str(folder / "out"), **{**DEFAULTS, **case.args, **(args or {})})
    given = {"processing_class": tokenizer, "train_dataset": texts(case.columns), **case.options, **options}
    if "teacher_model" in given:
        given["teacher_model"] = given["teacher_model"]()
    return case.trainer(model=model, args=config, **given)


def _train_a_little(model: Any) -> None:
    """Adapters as training leaves them: not the identity."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)


def both(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The same trainer with the switch and without, trained."""
    trainers = []
    for backend in ("sloth", None):
        trainer = make(name, folder / str(backend), backend=backend, **options)
        seed()
        trainer.train()
        trainers.append(trainer)
    return trainers[0], trainers[1]


def seed() -> None:
    """The same random numbers for what comes next."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def values(trainer: Any) -> list[dict[str, float]]:
    """What the trainer has logged, without what a clock told."""
    history = trainer.state.log_history
    return [{k: v for k, v in log.items() if not k.endswith((*CLOCKS, "step_time"))} for log in history]


def assert_same(ours: Any, stock: Any, watched: tuple[str, ...]) -> None:
    """Everything logged within 1e-4, losses within 1e-5: float32 summed in another order.

    Log ratios are differences of sums of some hundred nats, which float32 gives to 1e-5 each.
    """
    mine, theirs = values(ours), values(stock)
    assert len(mine) == len(theirs) > STEPS
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-5)
    logged = {key.removesuffix("s") for log in theirs for key in log}
    missing = [key for key in watched if key.removesuffix("s") not in logged]
    assert not missing, (missing, sorted(logged))
