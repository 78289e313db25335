"""The ops' tests need kernels that run: under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) or on
a GPU. Elsewhere only ``test_interpreter.py`` is collected, which runs the others in a process of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sloth_kernels import launch

RUNS_KERNELS = launch.interpreting() or torch.cuda.is_available()

collect_ignore = ["test_interpreter.py"] if launch.interpreting() else []
if not RUNS_KERNELS:
    collect_ignore += [
        path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_interpreter.py"
    ]


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
    counter, original = Launches(), getattr(Runner, method)

    def counted(*args: object, **kwargs: object) -> object:
        counter.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(Runner, method, counted)
    return counter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside the interpreter the kernels run on a GPU."""
    for item in items:
        if item.path.parent.name == "ops" and item.path.name != "test_interpreter.py" and not launch.interpreting():
            item.add_marker(pytest.mark.gpu)
