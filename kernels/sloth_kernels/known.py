"""Numbers on the device that the host knows anyway, as it made them or has already asked for them.

Who is asked for such a tensor's number need not wait for everything that the device has been given before it.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Number = int | float | bool

_KNOWN = WeakTensorKeyDictionary()
"""Tensors of one element -> their version and number, as long as that tensor lives."""


def know(tensor: torch.Tensor, number: Number) -> torch.Tensor:
    """``tensor``, of which ``known`` gives ``number`` until somebody writes to it."""
    _KNOWN[tensor] = _version(tensor), number
    return tensor


def known(tensor: torch.Tensor) -> Number | None:
    """The number that ``tensor`` holds, or None where nobody told of it."""
    version, number = _KNOWN.get(tensor) or (None, None)
    return number if version == _version(tensor) else None


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
