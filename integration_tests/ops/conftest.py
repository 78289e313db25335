"""The ops' tests need kernels that run: under Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported,
as ``make test`` sets it) or on a GPU. Elsewhere nothing is collected here."""

from __future__ import annotations

import pytest
import torch

from sloth_kernels import launch

collect_ignore_glob = [] if launch.interpreting() or torch.cuda.is_available() else ["test_*.py"]


class Launches:
    """How many kernels were launched since the test began."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts kernels as Triton's interpreter, or its compiler's runtime, executes them."""
    if launch.interpreting():
        from triton.runtime.interpreter import GridExecutor as Runner

        method = "__call__"
    else:
        from triton.runtime.jit import JITFunction as Runner

        method = "run"
        # what our launcher remembers of earlier tests would go past it
        monkeypatch.setattr(
            launch.Launcher, "__call__", lambda own, grid, *args, **options: own.kernel[grid](*args, **options)
        )
    counter, original = Launches(), getattr(Runner, method)

    def counted(*args: object, **kwargs: object) -> object:
        counter.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(Runner, method, counted)
    return counter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside the interpreter the kernels run on a GPU."""
    for item in items:
        if item.path.parent.name == "ops" and not launch.interpreting():
            item.add_marker(pytest.mark.gpu)
