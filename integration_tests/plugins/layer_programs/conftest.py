"""Who runs: a layer's program, or the layer's own forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from sloth_kernels.program import Program
from sloth_plugins.batch_fusion import documents


class Call(NamedTuple):
    """One run of a program."""

    program: Program
    x: torch.Tensor
    constants: dict[str, Any]
    kept: Any


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The runs of programs since the test began, without those by which the model is asked about documents."""
    seen: list[Call] = []
    original = Program.__call__

    def noted(self: Program, x: torch.Tensor, constants: Any, kept: Any = None, *rest: Any) -> torch.Tensor:
        seen.append(Call(self, x.detach(), constants, kept))
        return original(self, x, constants, kept, *rest)

    monkeypatch.setattr(Program, "__call__", noted)
    monkeypatch.setattr(documents, "_disagreement", lambda *args: None)
    return seen
