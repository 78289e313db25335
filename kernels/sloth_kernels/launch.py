"""Where a Triton kernel may run, and what every launch needs."""

from __future__ import annotations

import os

import torch

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETER_DTYPES = (torch.float32, torch.float16)
"""Triton's CPU interpreter yields NaN in bfloat16, so that dtype takes the reference there."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` before the first import of triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether kernels can take these tensors: on one CUDA device, or on the CPU under the interpreter, in a known dtype."""
    if interpreting():
        return all(t.dtype in INTERPRETER_DTYPES for t in tensors)
    device = tensors[0].device
    return device.type == "cuda" and all(t.device == device and t.dtype in TRITON_DTYPES for t in tensors)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (Triton's block sizes are powers of two)."""
    return 1 << max(0, n - 1).bit_length()
