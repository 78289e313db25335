"""What is trained: data only. ``names`` turns what a user asks for into workloads, ``tiny`` shrinks one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Point = tuple[int, int]
"""Rows a forward pass, and the length of the longest row: one figure of a workload."""


@dataclass(frozen=True)
class Workload:
    """One training set-up.

    Attributes:
        model: a name of ``models.SHAPES``.
        training: ``qlora`` (NF4 base, LoRA), ``lora`` (bf16 base, LoRA) or ``full`` (every weight, bf16).
        loop: ``trainer`` (the contender's own host) or ``plain`` (forward, backward, step), where batch grows.
        points: batch and length of each figure; those of a plain loop are taken one after the other in one process.
        accumulation: forward and backward passes a step.
        lengths: ``equal`` (every row as long as the longest) or ``alpaca`` (lognormal, median 95, mean 110 tokens).
        packing: the trainer fills rows of the point's length with several.
        steps: steps a point, ``warmup`` of which do not count.
    """

    name: str
    model: str = "llama-8b"
    training: Literal["qlora", "lora", "full"] = "qlora"
    loop: Literal["trainer", "plain"] = "trainer"
    points: tuple[Point, ...] = ((2, 2048),)
    accumulation: int = 4
    lengths: Literal["equal", "alpaca"] = "equal"
    packing: bool = False
    steps: int = 6
    warmup: int = 2
    learning_rate: float = 2e-4
    optimizer: str = "adamw_8bit"
    rank: int = 32

    @property
    def nf4(self) -> bool:
        """Whether the base is quantised."""
        return self.training == "qlora"


def _short(name: str, **options: Any) -> Workload:
    """Rows of Alpaca's lengths: the first passes of each length load kernels, and ours are recorded."""
    return Workload(name, lengths="alpaca", steps=24, warmup=16, **options)


def _rows(name: str, *points: Point) -> Workload:
    """A plain loop over points of growing size."""
    return Workload(name, loop="plain", points=points, accumulation=1, steps=3, warmup=1)


def _batches(length: int) -> Workload:
    """1 to 32 rows of one length."""
    return _rows(f"batch-{length}", *((rows, length) for rows in (1, 2, 4, 8, 16, 32)))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("full"),
        _short("alpaca"),
        _short("alpaca-batch", points=((8, 2048),), accumulation=1),
        _short("alpaca-1b", model="llama-1b"),
        Workload("packed", lengths="alpaca", packing=True),
        Workload("lora16", "llama-1b", "lora"),
        Workload("finetune", "llama-1b", "full", learning_rate=1e-5),
        Workload("mistral", "mistral-7b"),
        Workload("qwen", "qwen2.5-7b"),
        Workload("gemma", "gemma-2-9b"),
        _rows("short", (1, 512), (1, 1024), (1, 2048)),
        _rows("ctx", (1, 4096), (1, 8192), (1, 16384), (1, 32768), (1, 65536)),
        _batches(512),
        _batches(2048),
    )
}
GROUPS = {
    "all": tuple(WORKLOADS),
    "trainer": tuple(name for name, workload in WORKLOADS.items() if workload.loop == "trainer"),
    "rows": ("alpaca", "alpaca-batch", "alpaca-1b", "packed"),
    "architectures": ("mistral", "qwen", "gemma"),
    "length": ("short", "ctx"),
    "batch": ("batch-512", "batch-2048"),
    "growth": ("short", "ctx", "batch-512", "batch-2048"),
}


def names(asked: str) -> list[str]:
    """The workloads that ``full,growth`` stands for, each once.

    Raises:
        ValueError: a name is neither a workload nor a group.
    """
    found: list[str] = []
    for name in filter(None, asked.split(",")):
        if name not in GROUPS and name not in WORKLOADS:
            raise ValueError(f"unknown workload {name!r}; expected some of {', '.join((*WORKLOADS, *GROUPS))}")
        found += GROUPS.get(name, (name,))
    return list(dict.fromkeys(found))


def get(name: str, tiny: bool = False, steps: int | None = None, at_most: int | None = None) -> Workload:
    """The workload called ``name``, with other steps or in the size of a test; one step at least is always timed."""
    workload = WORKLOADS[name]
    if tiny:
        workload = replace(workload, points=_tiny_points(workload), accumulation=min(2, workload.accumulation))
    steps = workload.steps if steps is None else steps
    steps = steps if at_most is None else min(steps, at_most)
    return replace(workload, steps=steps, warmup=max(0, min(workload.warmup, steps - 1)))


def _tiny_points(workload: Workload) -> tuple[Point, ...]:
    return ((2, 64),) if workload.loop == "trainer" else tuple((1, 32 * n) for n in range(1, len(workload.points) + 1))
