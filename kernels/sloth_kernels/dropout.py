"""Dropout whose masks are drawn again where they are needed again, instead of being kept.

    x̃ = x m / (1 - p)        m ~ Bernoulli(1 - p)

The mask of a given shape and device is a function of the generator's state alone, so the state (16 bytes on CUDA, 5 KB
on a CPU; reading or setting it waits for nothing) stands for it. Masks are those of ``nn.Dropout`` under the same seed
for a contiguous x, and after a first draw the device's default generator is where ``nn.Dropout`` would have left it.
Any other layout of x is drawn for as if it were contiguous: a mask must not depend on where x happens to lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ALIGNMENT = 16
"""Bytes: the widest access of CUDA's dropout, which gives the elements other numbers where it cannot make it."""


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of ``device``, which ``nn.Dropout`` draws from there."""
    if device.type == "cpu":
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x̃ and m (of any dtype) for a mask drawn now. Nothing is drawn where x has no element or p is 1, as in torch."""
    x = x.contiguous()
    if p == 1.0 or x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    if x.device.type == "cpu":
        keep = torch.empty_like(x).bernoulli_(1 - p)
        return (x * keep).div_(1 - p), keep
    aligned = x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
    return torch.native_dropout(aligned, p, True)


@contextmanager
def replaying(device: torch.device) -> Iterator[torch.Generator]:
    """The device's generator, to be set to recorded states; afterwards it is where it was."""
    generator = generator_of(device)
    now = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(now)
