"""A device that plays recordings without a GPU: it does the work again and writes the result where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sloth_kernels.recording import Named, _leaves


class Repeats:
    """A ``Capture``. ``recorded``, ``played`` and ``lent`` (tensors) count."""

    def __init__(self) -> None:
        self.recorded = self.played = self.lent = 0

    def record(self, work: Callable[[], Named]) -> tuple[Named, Callable[[], object]]:
        self.recorded += 1
        made = work()

        def play() -> None:
            self.played += 1
            for old, new in zip(_leaves(made), _leaves(work()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.data.copy_(new)

        return made, play

    def unowned(self, tensor: torch.Tensor) -> torch.Tensor:
        self.lent += 1
        return tensor


class Refuses:
    """A ``Capture`` of a device on which the work cannot be recorded."""

    def record(self, work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")
