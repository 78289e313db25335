"""Training in a plain loop: forward, backward, optimizer step, where rows grow longer or more of them come at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from integration_tests.benchmarks.training import loading
from integration_tests.benchmarks.training.clock import allocated_gib, figures, reset_peak, wait
from integration_tests.benchmarks.training.contenders import Contender
from integration_tests.benchmarks.training.rows import start_adapters, zipf_ids
from integration_tests.benchmarks.training.workloads import Point, Workload

FLOAT32_TOKENS = 8192
"""Of the longest pass whose truth is computed without TF32: longer ones would take minutes a step."""


def run(contender: Contender, workload: Workload, folder: Path, points: list[Point]) -> Iterator[dict[str, Any]]:
    """Every point in turn with one model, its adapters set back between them; running out of memory ends the list.

    A larger point would run out as well, so those after it are results too.
    """
    model = load(contender, workload, folder)
    base = round(allocated_gib(), 3)
    for at, point in enumerate(points):
        try:
            if contender.truth and point[0] * point[1] > FLOAT32_TOKENS:
                loading.multiply_in_tf32(model)
            yield {
                **measure(model, workload, point, not contender.truth),
                "base_gib": base,
                **loading.findings(contender, model),
            }
        except torch.OutOfMemoryError:
            yield from ({"status": "oom", "batch": batch, "length": length} for batch, length in points[at:])
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load(contender: Contender, workload: Workload, folder: Path) -> Any:
    """The contender's model, ready to train."""
    if contender.kind == "unsloth":
        model = loading.unsloth_model(workload, folder)
    elif contender.ours:
        model = optimized_model(contender, workload, folder)
    else:
        model = loading.adapted_model(contender, workload, folder)
    return model.train()


def optimized_model(contender: Contender, workload: Workload, folder: Path) -> Any:
    """Ours, switched on for a loop of one's own."""
    from peft import get_peft_model

    import sloth_backend

    model: Any = get_peft_model(loading.base_model(contender, folder), loading.lora_config(workload.rank))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return sloth_backend.optimize(model, config=contender.options or None)


def measure(model: Any, workload: Workload, point: Point, autocast: bool = True) -> dict[str, Any]:
    """The steps of one point, on the same rows each time."""
    start_adapters(model)
    ids = token_ids(point, model.config.vocab_size)
    optimizer = make_optimizer(model, workload)
    seconds, losses = [], []
    reset_peak()
    for _ in range(workload.steps):
        wait()
        start = time.perf_counter()
        loss = step(model, optimizer, ids, autocast)
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return figures(workload, point, seconds, losses)


def token_ids(point: Point, vocab: int) -> torch.Tensor:
    """The rows of a point, (batch, length), on the device."""
    source = torch.Generator().manual_seed(point[0] * 1_000_003 + point[1])
    return zipf_ids(source, point, vocab).to(loading.device())


def make_optimizer(model: Any, workload: Workload) -> Any:
    """The workload's optimizer over what trains; AdamW without a GPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if loading.device().type == "cpu":
        return torch.optim.AdamW(trained, lr=workload.learning_rate)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trained, lr=workload.learning_rate)


def step(model: Any, optimizer: Any, ids: torch.Tensor, autocast: bool = True) -> torch.Tensor:
    """One step, in bf16 or as the model is; returns its loss."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
