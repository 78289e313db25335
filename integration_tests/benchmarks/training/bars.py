"""What we set out to reach, as data: a figure of ours, what it is compared with, and how much it may be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from integration_tests.benchmarks.training.contenders import DRIVER_GIB
from integration_tests.benchmarks.training.workloads import Point

EQUAL = 1.0


@dataclass(frozen=True)
class Bar:
    """``figure`` of ``contender`` is at most ``limit``, or at most ``limit`` times that of ``versus``."""

    workload: str
    contender: str
    figure: str
    limit: float
    versus: str = ""
    point: Point = (2, 2048)

    def describe(self) -> str:
        """The bar in words."""
        what = "seconds a step" if self.figure == "step_seconds" else self.figure.replace("_gib", " GiB")
        if not self.versus:
            return f"{what} <= {self.limit:g}"
        if self.figure == "step_seconds" and self.limit == EQUAL:
            return f"not slower than {self.versus}"
        if self.figure == "step_seconds":
            return f"at least {1 / self.limit:.2g}x as fast as {self.versus}"
        return f"{what} <= {self.limit:g} x that of {self.versus}"


def faster(workload: str, contender: str, times: float, versus: str) -> Bar:
    """At least ``times`` as fast as ``versus``."""
    return Bar(workload, contender, "step_seconds", 1 / times, versus)


BARS = (
    Bar("full", "sloth", "step_seconds", 0.92),
    faster("full", "sloth", 3.2, "stock"),
    faster("full", "sloth", 1.8, "unsloth"),
    Bar("full", "sloth-least", "peak_gib", 6.6),
    faster("full", "sloth-least", EQUAL, "unsloth"),
    Bar("full", "sloth-16gb", "reserved_gib", 16 - DRIVER_GIB),
    faster("full", "sloth-16gb", EQUAL, "unsloth"),
    Bar("full", "sloth-24gb", "reserved_gib", 24 - DRIVER_GIB),
    faster("full", "sloth-24gb", EQUAL, "unsloth"),
    faster("lora16", "sloth-as-liger", 1.3, "liger"),
    Bar("lora16", "sloth-as-liger", "peak_gib", EQUAL, "liger"),
    faster("finetune", "sloth-as-liger", 1.3, "liger"),
    Bar("finetune", "sloth-as-liger", "peak_gib", EQUAL, "liger"),
    Bar("ctx", "sloth", "step_seconds", 11.5, point=(1, 65536)),
    Bar("alpaca", "sloth", "step_seconds", 0.15),
    faster("alpaca", "sloth", 18, "stock"),
    faster("alpaca", "sloth", 10, "unsloth"),
    replace(faster("alpaca-batch", "sloth", 3.5, "unsloth"), point=(8, 2048)),
    faster("alpaca-1b", "sloth", 12, "stock"),
    faster("packed", "sloth", 1.7, "unsloth"),
    faster("packed", "sloth", 2.5, "stock"),
    *(faster(workload, "sloth", 2.5, "stock") for workload in ("mistral", "qwen", "gemma")),
)
