"""Trainers on tiny models that the backend is switched on for by hand, and how to compare their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins.batch_fusion.test_fusion import Watch
from sloth_backend import SlothConfig, phases
from sloth_backend.run import Run

TOKENIZER = tiny.make_tokenizer()
ARGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 2,
    "save_strategy": "no",
    "learning_rate": 0.1,
    "optim": "sgd",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "remove_unused_columns": False,
}
"""Two steps of four micro-batches of two rows; Adam would make much of roundings where gradients are small."""


def rows(lengths: list[int], trained: Any = lambda i, at: at > i % 3, **more: Any) -> list[dict[str, Any]]:
    """Tokenised rows; token ``at`` of row ``i`` has a label where ``trained`` says so."""
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 300, (n,), generator=g).tolist() for n in lengths]
    labels = [[token if trained(i, at) else -100 for at, token in enumerate(row)] for i, row in enumerate(ids)]
    return [
        {"input_ids": row, "labels": label, **{name: make(i, row) for name, make in more.items()}}
        for i, (row, label) in enumerate(zip(ids, labels, strict=True))
    ]


def run(
    folder: Path,
    model: Any,
    data: Any,
    options: dict[str, Any] | None,
    cls: Any = Trainer,
    args: Any = None,
    **given: Any,
) -> tuple[Any, Watch]:
    """A trainer that has run, with the backend's phases where there are ``options`` for it."""
    watch = Watch()
    args = args or TrainingArguments(str(folder), **ARGS)
    given.setdefault("data_collator", DataCollatorForSeq2Seq(TOKENIZER))
    torch.manual_seed(1)
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=[watch], **given)
    if options is not None:
        config = SlothConfig.parse({"print_report": False, **options})
        assert config is not None
        session = phases.begin(Run("user", config))
        phases.before_train(session, model, trainer)
    trainer.train()
    return trainer, watch


def assert_same(mine: tuple[Any, Watch], theirs: tuple[Any, Watch], tolerance: float = 1e-6) -> None:
    """Gradients of both steps, and all that is logged but times."""
    assert len(mine[1].gradients) == len(theirs[1].gradients) == 2
    for step, (ours, stock) in enumerate(zip(mine[1].gradients, theirs[1].gradients, strict=True)):
        assert ours.keys() == stock.keys()
        for name, grad in stock.items():
            assert (ours[name] - grad).norm() <= tolerance * (3 if step else 1) * grad.norm() + 1e-12, name
    assert len(mine[0].state.log_history) == len(theirs[0].state.log_history)
    for ours, stock in zip(mine[0].state.log_history, theirs[0].state.log_history, strict=True):
        for key in stock:
            if not key.endswith(("runtime", "per_second", "per_sec_per_gpu")):
                assert ours[key] == pytest.approx(stock[key], rel=1e-5), key


def findings(model: Any, action: Any = "skipped") -> list[str]:
    """What the report says of batch fusion."""
    return [f.reason for f in sloth_backend.report(model).of(action=action, capability="batch_fusion")]
