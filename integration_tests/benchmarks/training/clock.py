"""Seconds, losses and memory of each step, and the versions behind them."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback

from integration_tests.benchmarks.training.rows import tokens_per_step
from integration_tests.benchmarks.training.workloads import Point, Workload

GIB = 2**30
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
OF_KIND = {"liger": ("liger-kernel",), "axolotl": ("axolotl", "liger-kernel"), "unsloth": ("unsloth", "unsloth-zoo")}


def wait() -> None:
    """Until the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated_gib() -> float:
    """What tensors hold on the device now; 0 on a CPU."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def reset_peak() -> None:
    """Start measuring the peak anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """``peak_gib`` that tensors held at once and ``reserved_gib`` that the allocator took; zeros on a CPU."""
    if not torch.cuda.is_available():
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_gib": round(peak / GIB, 3), "reserved_gib": round(reserved / GIB, 3)}


class Clock(TrainerCallback):
    """Times the steps of a Trainer, the device idle at both ends, and collects the losses it logs."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        wait()
        reset_peak()
        self.stamps.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stamp the optimizer step."""
        wait()
        self.stamps.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the step's loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        return [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]


def figures(workload: Workload, point: Point, seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """One point's result, of the seconds of all its steps."""
    median = statistics.median(seconds[workload.warmup :])
    return {
        "status": "ok",
        "batch": point[0],
        "length": point[1],
        "step_seconds": round(median, 5),
        "all_seconds": [round(value, 5) for value in seconds],
        "tokens_per_second": round(tokens_per_step(workload, point) / median, 1),
        "losses": [round(value, 5) for value in losses],
        **peaks(),
    }


def versions(kind: str) -> dict[str, str]:
    """Of everything that takes part in a contender's run."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *OF_KIND.get(kind, ())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """``NVIDIA H200``, or the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
