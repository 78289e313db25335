"""bitsandbytes' 4-bit tensors as the kernels take them."""

from __future__ import annotations

from typing import Any

import torch

from sloth_kernels.ops.nf4 import Quantized4bit


def from_bitsandbytes(packed: torch.Tensor, state: Any) -> Quantized4bit:
    """The plain tensors behind ``packed`` and its ``bitsandbytes.functional.QuantState``."""
    nested = state.state2
    return Quantized4bit(
        packed.detach(),
        state.absmax,
        state.code,
        tuple(state.shape),
        state.blocksize,
        nested.absmax if nested else None,
        nested.code if nested else None,
        state.offset,
        nested.blocksize if nested else 256,
    )
