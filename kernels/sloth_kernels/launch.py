"""Where a Triton kernel may run, and what every launch needs.

Ops import ``triton`` and ``tl`` from here, so that their files also load where Triton is not installed (macOS): the
kernels are then plain functions that nothing calls, since ``runs_triton`` is False.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

HAS_TRITON = find_spec("triton") is not None

if TYPE_CHECKING:
    import triton.language as tl

    triton: Any
elif HAS_TRITON:
    import triton
    import triton.language as tl
else:

    def _undecorated(kernel: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return kernel if kernel is not None else _undecorated

    triton = SimpleNamespace(jit=_undecorated)
    tl = SimpleNamespace()

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETER_DTYPES = (torch.float32, torch.float16)
"""Triton's CPU interpreter yields NaN in bfloat16, so that dtype takes the reference there."""


@lru_cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` before the first import of triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether kernels take these tensors: a known dtype, all on one CUDA device or on the CPU under the interpreter."""
    if not HAS_TRITON:
        return False
    if interpreting():
        return all(t.dtype in INTERPRETER_DTYPES for t in tensors)
    device = tensors[0].device
    return device.type == "cuda" and all(t.device == device and t.dtype in TRITON_DTYPES for t in tensors)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (Triton's block sizes are powers of two)."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    """``n / d`` rounded up."""
    return -(-n // d)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors; 4 under the interpreter, so that persistent loops take several turns."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, where Triton launches; free when it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class Launcher:
    """Launches a kernel with less work on the host: ``kernel(grid, *tensors_and_numbers, **constants_and_options)``.

    Triton looks at every argument anew to find the compiled kernel for it: by dtypes, by pointers' and numbers' being
    multiples of 16, by numbers' being 1. Here a call with the very numbers, dtypes and alignments of an earlier one is
    handed to what Triton compiled, or found, for that one; layers make the same calls again and again. What tells calls
    apart must come before the constants; options changed in Triton's knobs are seen by new calls alone.
    """

    MOST = 4096
    """Calls that are remembered."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        first = args[0]
        if not first.is_cuda:
            self.kernel[grid](*args, **constants)
            return
        device = first.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, *args, **constants)
            return
        alike = [a if type(a) is int or not isinstance(a, torch.Tensor) else _alike(a) for a in args]
        key = (device, *alike, *constants.values())
        known = self.compiled.get(key)
        if known is not None:
            compiled, last = known
            compiled[(*grid, 1, 1)[:3]](*args, *last)
            return
        self._remember(key, self.kernel[grid](*args, **constants), len(args), constants)

    def _remember(self, key: tuple[Any, ...], compiled: Any, count: int, constants: Mapping[str, Any]) -> None:
        """Note what ``kernel[grid]`` returned, where that can be launched by itself.

        Not on AMD's GPUs, where Triton looks at the tensors' sizes too, and not where hooks want to see every launch.
        """
        if torch.version.hip is not None or getattr(self.kernel, "pre_run_hooks", None):
            return
        names = getattr(self.kernel, "arg_names", ())[count:]
        if hasattr(type(compiled), "__getitem__") and all(name in constants for name in names):
            if len(self.compiled) >= self.MOST:
                self.compiled.clear()
            self.compiled[key] = compiled, tuple(constants[name] for name in names)


def _alike(tensor: torch.Tensor) -> Any:
    """What Triton tells tensors apart by."""
    misalignment = tensor.data_ptr() % 16
    return (tensor.dtype, misalignment) if misalignment else tensor.dtype


def row_groups(x: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions of ``x`` (..., H), merged where one stride walks several."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, stride))
    return groups[::-1]


def inner_rows(*tensors: torch.Tensor) -> int:
    """How many rows follow one another at one stride before the outer stride applies; 1 where one stride is enough."""
    for tensor in tensors:
        if not tensor.is_contiguous() and len(groups := row_groups(tensor)) == 2:
            return groups[1][0]
    return 1


def row_strides(x: torch.Tensor, inner: int = 1) -> tuple[torch.Tensor, int, int]:
    """Strides such that row ``r`` of ``x`` (..., H) starts at ``r // inner * strides[0] + r % inner * strides[1]``.

    Returns ``x`` too: itself, or a contiguous copy where its layout cannot be walked so or its rows are not contiguous.
    """
    width = x.shape[-1]
    if x.is_contiguous():
        return x, inner * width, width
    if x.stride(-1) == 1 or width == 1:
        groups = row_groups(x)
        if len(groups) == 1:
            return x, inner * groups[0][1], groups[0][1]
        if len(groups) == 2 and groups[1][0] == inner:
            return x, groups[0][1], groups[1][1]
    return x.contiguous(), inner * width, width
