"""What a demo run is asked for and what comes out of it, as plain data that crosses processes and becomes JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sloth_backend.findings import Report

Curve = list[tuple[int, float]]
"""(step, loss) points; the loss is the mean over tokens, in nats."""


@dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        backend: train with ``backend="sloth"``, or on stock TRL.
        model: folder or hub id of a causal language model; None trains the demo's own from random weights.
        data: a jsonl file; None takes the docstrings of the standard library.
        steps: optimizer steps; None takes the recipe's.
        seed: of the weights, the order of the data and everything else that is drawn.
        lora: train LoRA adapters instead of all weights; None means yes for ``model``, no for the demo's own.
    """

    backend: bool = True
    model: str | None = None
    data: Path | None = None
    steps: int | None = None
    seed: int = 0
    lora: bool | None = None

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA adapters are trained rather than all weights."""
        return self.model is not None if self.lora is None else self.lora

    @property
    def name(self) -> str:
        """How the run is called in tables and pictures."""
        return 'backend="sloth"' if self.backend else "stock TRL"


@dataclass(frozen=True)
class Sample:
    """A held-out question, what the data says and what the trained model says (greedy)."""

    question: str
    expected: str
    answer: str


@dataclass
class Outcome:
    """What a run produced.

    Attributes:
        model: what was trained, in words.
        train: the loss of each step's own batch.
        held_out: the loss on the conversations kept back, before the first step, in between and after the last.
        seconds: wall-clock time of each step, without the evaluations.
        peak_bytes: peak of the device's allocated memory on a GPU, of the process's resident memory on a CPU.
    """

    settings: Settings
    device: str
    model: str
    data: str
    train: Curve
    held_out: Curve
    seconds: list[float]
    peak_bytes: int
    report: Report
    sample: Sample
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> float:
        """The median, which leaves the first, slower steps out of account."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        settings = asdict(self.settings) | {"data": str(self.settings.data) if self.settings.data else None}
        kept = ("device", "model", "data", "versions", "train", "held_out", "seconds", "peak_bytes")
        return {
            "settings": settings,
            **{name: getattr(self, name) for name in kept},
            "seconds_per_step": self.seconds_per_step,
            "sample": asdict(self.sample),
            "report": self.report.to_dict(),
        }


def max_difference(one: Outcome, other: Outcome) -> float:
    """The largest distance between two runs' training losses at the same step."""
    return max(abs(a - b) for (_, a), (_, b) in zip(one.train, other.train, strict=True))
