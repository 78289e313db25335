"""Training through ``axolotl train``: a YAML of the same set-up, Axolotl's LoRA kernels, Liger's loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from integration_tests.benchmarks.training import axolotl_clock
from integration_tests.benchmarks.training.contenders import Contender
from integration_tests.benchmarks.training.loading import device
from integration_tests.benchmarks.training.rows import token_rows
from integration_tests.benchmarks.training.workloads import Point, Workload

CLOCK = f"{axolotl_clock.__name__}.ClockPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
ADAPTERS = {"qlora": {"adapter": "qlora", "load_in_4bit": True}, "lora": {"adapter": "lora"}, "full": {}}


def run(
    contender: Contender, workload: Workload, folder: Path, points: list[Point], tiny: bool = False
) -> Iterator[dict[str, Any]]:
    """Train each point in a process of Axolotl's."""
    for point in points:
        with tempfile.TemporaryDirectory(prefix="training-benchmark-") as work:
            yield train(workload, folder, point, Path(work), tiny)


def train(workload: Workload, folder: Path, point: Point, work: Path, tiny: bool) -> dict[str, Any]:
    """One run of Axolotl.

    Raises:
        torch.OutOfMemoryError: it ran out of memory.
        RuntimeError: it failed otherwise; with the end of its output.
    """
    result = work / "result.json"
    write_rows(workload, folder, point, work / "rows.jsonl")
    (work / "run.yml").write_text(yaml.safe_dump(settings(workload, folder, point, work)))
    job = {"workload": workload.name, "tiny": tiny, "steps": workload.steps, "point": point, "result": str(result)}
    environment = {**os.environ, axolotl_clock.JOB: json.dumps(job), "AXOLOTL_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", str(work / "run.yml")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if result.exists():
        return json.loads(result.read_text())
    if "OutOfMemoryError" in done.stdout:
        raise torch.OutOfMemoryError("axolotl train ran out of memory")
    raise RuntimeError(f"axolotl train ended with {done.returncode} and no result: {done.stdout[-2000:]}")


def write_rows(workload: Workload, folder: Path, point: Point, target: Path) -> None:
    """The workload's rows as Axolotl takes tokens that are ready."""
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    with target.open("w") as file:
        for ids in token_rows(workload, point, vocab):
            row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
            file.write(json.dumps(row) + "\n")


def settings(workload: Workload, folder: Path, point: Point, work: Path) -> dict[str, Any]:
    """The YAML."""
    on_gpu = device().type == "cuda"
    adapters = ADAPTERS[workload.training]
    if adapters:
        shape = {"lora_r": workload.rank, "lora_alpha": workload.rank, "lora_dropout": 0.0, "lora_target_linear": True}
        adapters = {**adapters, **shape}
    return {
        "base_model": str(folder),
        "datasets": [{"path": str(work / "rows.jsonl"), "ds_type": "json"}],
        "dataset_prepared_path": str(work / "prepared"),
        "output_dir": str(work / "out"),
        **adapters,
        **fast_paths(on_gpu),
        "sequence_len": point[1],
        "pad_to_sequence_len": False,
        "micro_batch_size": point[0],
        "gradient_accumulation_steps": workload.accumulation,
        "max_steps": workload.steps,
        "num_epochs": 1,
        "learning_rate": workload.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": workload.optimizer if on_gpu else "adamw_torch",
        "weight_decay": 0.0,
        "bf16": on_gpu,
        "tf32": on_gpu,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # Rows in the order in which they are written, as for everyone.
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
    }


def fast_paths(on_gpu: bool) -> dict[str, Any]:
    """Axolotl's own LoRA kernels switch themselves on and need a GPU; Liger's loss where it is installed."""
    if not on_gpu:
        kernels = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
        return {**dict.fromkeys(kernels, False), "plugins": [CLOCK]}
    liger = find_spec("liger_kernel") is not None
    loss = {"liger_fused_linear_cross_entropy": True} if liger else {}
    return {"sdp_attention": True, "plugins": [CLOCK, LIGER] if liger else [CLOCK], **loss}
