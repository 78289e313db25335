"""A launcher hands a call to the compiled kernel of an earlier one only where Triton itself would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sloth_kernels.launch import Launcher


class OnGpu(torch.Tensor):
    """A tensor that says it is on the first GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


class Kernel:
    """Notes what is launched through Triton's own path, and what through the kernel that it compiled."""

    arg_names = ("x", "n", "stride", "BLOCK")

    def __init__(self) -> None:
        self.slow: list[Any] = []
        self.fast: list[Any] = []
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Compiled:
            self.slow.append((grid, args, constants))
            return Compiled(self, constants["BLOCK"])

        return launch


class Compiled:
    """What Triton returns from a launch."""

    def __init__(self, kernel: Kernel, block: int) -> None:
        self.kernel, self.block = kernel, block

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.kernel.fast.append((grid, args, self.block))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def tensor(start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """64 elements, ``start`` elements behind an address that is a multiple of 64 bytes."""
    raw = torch.zeros(256, dtype=dtype)
    first = -raw.data_ptr() % 64 // raw.element_size()
    return raw[first + start : first + start + 64].as_subclass(OnGpu)


def test_a_call_like_an_earlier_one_is_launched_directly(kernel: Kernel) -> None:
    launch, other = Launcher(kernel), tensor()
    launch((7,), tensor(), 64, 1, BLOCK=32, num_warps=4)
    launch((9,), other, 64, 1, BLOCK=32, num_warps=4)
    assert len(kernel.slow) == 1
    ((grid, args, block),) = kernel.fast
    assert (grid, args[0] is other, args[1:], block) == ((9, 1, 1), True, (64, 1, 32), 32)


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((tensor(1), 64, 1), {"BLOCK": 32, "num_warps": 4}),
        ((tensor(dtype=torch.float64), 64, 1), {"BLOCK": 32, "num_warps": 4}),
        ((tensor(), 65, 1), {"BLOCK": 32, "num_warps": 4}),
        ((tensor(), 64, 2), {"BLOCK": 32, "num_warps": 4}),
        ((None, 64, 1), {"BLOCK": 32, "num_warps": 4}),
        ((tensor(), 64, 1), {"BLOCK": 64, "num_warps": 4}),
        ((tensor(), 64, 1), {"BLOCK": 32, "num_warps": 8}),
    ],
)
def test_any_other_call_is_left_to_triton(kernel: Kernel, args: Any, constants: Any) -> None:
    kernel.arg_names = ("y", *Kernel.arg_names)  # type: ignore[assignment]
    launch, y = Launcher(kernel), tensor()
    launch((7,), y, tensor(), 64, 1, BLOCK=32, num_warps=4)
    launch((7,), y, *args, **constants)
    assert len(kernel.slow) == 2
    assert not kernel.fast


def test_hooks_see_every_launch(kernel: Kernel) -> None:
    kernel.pre_run_hooks.append(print)
    launch = Launcher(kernel)
    for _ in range(2):
        launch((7,), tensor(), 64, 1, BLOCK=32)
    assert len(kernel.slow) == 2


def test_the_cpu_is_the_interpreters(kernel: Kernel) -> None:
    launch = Launcher(kernel)
    for _ in range(2):
        launch((7,), torch.zeros(4), 64, 1, BLOCK=32)
    assert len(kernel.slow) == 2
