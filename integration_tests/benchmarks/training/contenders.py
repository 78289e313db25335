"""Who trains: data, and whether each is installed."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from integration_tests.benchmarks.training.workloads import Point, Workload

DRIVER_GIB = 0.6
"""What the driver takes of a card before any tensor; the rest is the allocator's."""
TRUTH_TOKENS = 32768
"""Of one pass in float32 of a plain loop."""


@dataclass(frozen=True)
class Contender:
    """One system.

    Attributes:
        title: how readers know it.
        kind: what loads and runs it: ``stock``, ``liger``, ``unsloth``, ``axolotl`` or ``sloth``.
        package: what must be importable.
        options: the run's ``backend`` mapping, for ours.
        card_gib: the card to imitate: the process may hold this much, less what the driver takes.
        within: the contender whose peak is its budget; it runs when that one has a result of the workload.
        workloads: those it is for; all where there are none.
        truth: its losses are what the others' rounding is measured by; its figures are no contender's.
        steps: at most so many, where more would only cost time.
        colour: in the pictures.
    """

    title: str
    kind: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    card_gib: float | None = None
    within: str = ""
    workloads: tuple[str, ...] = ()
    truth: bool = False
    steps: int | None = None
    colour: str = "#9aa0a6"

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.kind == "sloth"

    def runs(self, workload: Workload) -> bool:
        """Whether it can run ``workload``: Axolotl brings its own loop."""
        if self.workloads and workload.name not in self.workloads:
            return False
        return workload.loop == "trainer" or self.kind != "axolotl"

    def takes(self, workload: Workload, point: Point) -> bool:
        """Whether it runs that point: the truth is slow, and of a plain loop it takes ``TRUTH_TOKENS`` at most."""
        return not self.truth or workload.loop == "trainer" or point[0] * point[1] <= TRUTH_TOKENS

    def with_budget(self, budget_gb: float | None) -> Contender:
        """Itself, or where it trains within another's memory, itself with that as the run's ``vram_budget_gb``.

        Raises:
            ValueError: it trains within another's memory and none is given.
        """
        if not self.within:
            return self
        if budget_gb is None:
            raise ValueError(f"{self.title} needs a budget: the peak GiB of {self.within} and {DRIVER_GIB} GiB more")
        return replace(self, options={**self.options, "vram_budget_gb": budget_gb})


def _sloth(title: str, colour: str, card_gib: float | None = None, **options: Any) -> Contender:
    budget = {"vram_budget_gb": card_gib} if card_gib else {}
    return Contender(title, "sloth", "sloth_backend", {**options, **budget}, card_gib, colour=colour)


CONTENDERS = {
    "stock": Contender("transformers + PEFT", "stock", "trl", colour="#9aa0a6"),
    "stock-fp32": Contender("the same in float32", "stock", "trl", truth=True, steps=3, colour="#d5d8dc"),
    "liger": Contender("TRL + Liger", "liger", "liger_kernel", colour="#d08c2e"),
    "axolotl": Contender("Axolotl + Liger", "axolotl", "axolotl", colour="#8e6bb0"),
    "unsloth": Contender("Unsloth", "unsloth", "unsloth", colour="#4f7fb5"),
    "sloth": _sloth("sloth_backend", "#2f7d4f"),
    "sloth-fastest": _sloth("sloth_backend, fastest", "#17502f", memory="fastest"),
    "sloth-as-liger": Contender(
        "sloth_backend, within Liger's memory",
        "sloth",
        "sloth_backend",
        within="liger",
        workloads=("lora16", "finetune"),
        colour="#49a06c",
    ),
    "sloth-least": _sloth("sloth_backend, least memory", "#6fb38a", memory="least"),
    "sloth-16gb": _sloth("sloth_backend, 16 GB card", "#8fc9a6", card_gib=16),
    "sloth-24gb": _sloth("sloth_backend, 24 GB card", "#b3dcc3", card_gib=24),
}
"""In the order of tables and pictures; the first is the one that others are compared with."""


def names(asked: str) -> list[str]:
    """The contenders that ``stock,sloth`` stands for; ``all`` for all.

    Raises:
        ValueError: there is no contender of that name.
    """
    found = list(CONTENDERS) if asked == "all" else [name for name in asked.split(",") if name]
    unknown = [name for name in found if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"unknown contender {', '.join(unknown)}; expected some of {', '.join(CONTENDERS)}")
    return list(dict.fromkeys(found))


def installed(name: str, sites: dict[str, str]) -> bool:
    """Whether the contender's package can be imported here, or in the folder that ``sites`` names for its kind."""
    contender = CONTENDERS[name]
    path = [*sites.get(contender.kind, "").split(":"), *sys.path]
    return importlib.machinery.PathFinder.find_spec(contender.package, path) is not None
