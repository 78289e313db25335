"""Training through TRL's SFTTrainer: stock, Liger, Unsloth and ours."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from integration_tests.benchmarks.training import loading
from integration_tests.benchmarks.training.clock import Clock, allocated_gib, figures
from integration_tests.benchmarks.training.contenders import Contender
from integration_tests.benchmarks.training.rows import start_adapters, token_rows
from integration_tests.benchmarks.training.workloads import Point, Workload


def run(contender: Contender, workload: Workload, folder: Path, points: list[Point]) -> Iterator[dict[str, Any]]:
    """Train each point; a trainer's workload has one."""
    for point in points:
        clock = Clock()
        trainer, base = make_trainer(contender, workload, folder, point)
        trainer.add_callback(clock)
        trainer.train()
        result = figures(workload, point, clock.seconds, clock.losses)
        yield {**result, "base_gib": round(base, 3), **loading.findings(contender, trainer.model)}


def make_trainer(contender: Contender, workload: Workload, folder: Path, point: Point) -> tuple[SFTTrainer, float]:
    """The trainer, ready to train, and the GiB that the loaded model takes."""
    model, extra = load(contender, workload, folder)
    base = allocated_gib()
    rows = [{"input_ids": row} for row in token_rows(workload, point, model.config.vocab_size)]
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(rows),
        args=arguments(contender, workload, point),
        **extra,
    )
    trained: Any = trainer.model
    start_adapters(trained)
    if contender.truth:
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL makes the adapters of a 4-bit base bf16
    return trainer, base


def load(contender: Contender, workload: Workload, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and what SFTTrainer is told besides."""
    if contender.kind == "unsloth":
        return loading.unsloth_model(workload, folder), {}
    if not contender.ours:
        return loading.adapted_model(contender, workload, folder), {}
    import sloth_backend  # noqa: F401  the switch, where the package is on the path without being installed

    adapters = {} if workload.training == "full" else {"peft_config": loading.lora_config(workload.rank)}
    return loading.base_model(contender, folder), {**adapters, "backend": contender.options or "sloth"}


def arguments(contender: Contender, workload: Workload, point: Point) -> SFTConfig:
    """The same training for everyone: rows in order, constant rate, checkpointing on."""
    on_gpu = loading.device().type == "cuda"
    return SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="training-benchmark-"),
        per_device_train_batch_size=point[0],
        gradient_accumulation_steps=workload.accumulation,
        max_steps=workload.steps,
        max_length=point[1],
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        optim=workload.optimizer if on_gpu else "adamw_torch",
        bf16=on_gpu and not contender.truth,
        fp16=False,
        tf32=False if contender.truth and on_gpu else None,
        use_cpu=not on_gpu,
        gradient_checkpointing=True,
        # Unsloth brings a checkpointing of its own.
        gradient_checkpointing_kwargs=None if contender.kind == "unsloth" else {"use_reentrant": False},
        use_liger_kernel=contender.kind == "liger",
        train_sampling_strategy="sequential",
        packing=workload.packing,
        seed=0,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
