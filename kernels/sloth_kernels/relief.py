"""Out of memory is not the end while something on the device can be computed again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Giver(Protocol):
    """Holds device memory that it can do without."""

    def give_up(self) -> bool:
        """Let go of it; whether there was any."""
        ...


givers: weakref.WeakSet[Giver] = weakref.WeakSet()
"""Everyone who can be asked; they leave by dying or by being discarded."""


def relieve(spare: Giver | None = None) -> bool:
    """Ask every giver but ``spare`` and hand the memory back to the device; whether there was any."""
    gave = [giver.give_up() for giver in list(givers) if giver is not spare]
    if any(gave) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return any(gave)


def with_relief(run: Callable[..., T], *args: object, spare: Giver | None = None) -> T:
    """``run(*args)``, once more after ``relieve`` where the device was out of memory.

    ``run`` must be able to start over: it may not have changed anything before it ran out.
    """
    try:
        return run(*args)
    except torch.OutOfMemoryError:
        pass  # the exception holds the frames that hold the tensors: it must be gone before anything is freed
    relieve(spare)
    return run(*args)
