"""Short runs of Axolotl on a tiny model in this process, and how to compare them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import yaml

from integration_tests import tiny
from sloth_backend.hosts.axolotl_config import OWN_LORA_KERNELS

STEPS = 3
COMPARED = ("loss", "grad_norm", "eval_loss", "train_loss")
STOCK = dict.fromkeys(OWN_LORA_KERNELS, False)
"""Axolotl's own LoRA kernels do not run on a CPU."""


class Outcome(NamedTuple):
    """What a run leaves."""

    cfg: Any
    model: Any
    tokenizer: Any
    trainer: Any

    @property
    def logs(self) -> list[dict[str, float]]:
        """Losses and norms, as logged."""
        history = self.trainer.state.log_history
        return [{key: log[key] for key in COMPARED if key in log} for log in history]


def options(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of LoRA in float32 on the CPU, as a YAML would say it; a change to None takes a key away."""
    shared = model.with_name(f"{model.name}_data")  # tokenising takes longer than the training
    given = {
        "base_model": str(model),
        "datasets": [{"path": str(rows(shared, "alpaca")), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(shared / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "seed": 7,
    }
    return {key: value for key, value in {**given, **changes}.items() if value is not None}


def rows(folder: Path, kind: str) -> Path:
    """A file of 48 rows of one of ``ROWS``."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.jsonl"
    if not path.exists():
        said = zip(*(tiny.sentences(48, seed) for seed in (1, 2, 3)), strict=True)
        found = [ROWS[kind](number, *three) for number, three in enumerate(said)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return path


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "alpaca": lambda _, ask, answer, __: {"instruction": ask, "output": answer, "input": ""},
    "pairs": lambda _, ask, good, bad: {"prompt": ask, "chosen": good, "rejected": bad},
    "labelled": lambda number, ask, good, _: {"prompt": ask, "completion": good, "label": number % 2 == 0},
    "chats": lambda _, ask, good, bad: {"chosen": _chat(ask, good), "rejected": _chat(ask, bad)},
}
"""What is asked and answered: plainly, well and badly, with a verdict, and as two conversations."""


def write(path: Path, given: dict[str, Any]) -> Path:
    """``given`` as a YAML file; returns ``path``."""
    path.write_text(yaml.safe_dump(given))
    return path


def load(given: dict[str, Any]) -> Any:
    """The validated configuration, by Axolotl's Python API."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    Path(given["output_dir"]).mkdir(parents=True, exist_ok=True)
    return load_cfg(DictDefault(given))


def data(cfg: Any) -> Any:
    """What Axolotl makes of the data."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets, load_preference_datasets

    return (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg, cli_args=TrainerCliArgs())


def train(given: dict[str, Any]) -> Outcome:
    """Train by Axolotl's Python API; adapters are drawn alike in every run."""
    import transformers
    from axolotl.train import train as axolotl_train

    cfg = load(given)
    meta = data(cfg)
    transformers.set_seed(3)
    return Outcome(cfg, *axolotl_train(cfg=cfg, dataset_meta=meta))


def assert_same_logs(ours: Outcome, stock: Outcome) -> None:
    """Losses within 1e-5, gradients within 1e-4, relative: float32 summed in another order."""
    assert len(ours.logs) == len(stock.logs) > STEPS
    for mine, theirs in zip(ours.logs, stock.logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
        losses = [key for key in theirs if key.endswith("loss")]
        assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=1e-5)
