"""What a program's backward has at hand: values that were kept, and values that wait elsewhere until needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sloth_kernels.relief import with_relief


class Parked(Protocol):
    """A value that waits elsewhere."""

    def restore(self) -> torch.Tensor:
        """The value, back on the device."""
        ...


class Park(NamedTuple):
    """Which kept values wait elsewhere; ``put`` takes one there without waiting for it."""

    names: frozenset[str]
    put: Callable[[torch.Tensor], Parked]


class Here:
    """A value that is where it was, or is found by ``find``."""

    def __init__(self, find: Callable[[], torch.Tensor]) -> None:
        self.find = find

    def restore(self) -> torch.Tensor:
        """The value."""
        return self.find()


NOWHERE = Park(frozenset(), lambda value: Here(lambda: value))


class Values(dict[str, Any]):
    """What a backward has at hand; what is parked elsewhere comes when it is first looked at.

    ``dying`` are the values that go with the step that runs.
    """

    def __init__(self, present: Mapping[str, Any], parked: dict[str, Parked]) -> None:
        super().__init__(present)
        self.parked = parked
        self.dying: Sequence[str] = ()

    def __missing__(self, name: str) -> Any:
        # Without room for it now it goes on waiting, until others have given some up.
        value = self[name] = with_relief(self.parked[name].restore)
        del self.parked[name]
        return value

    def let_go(self, names: Iterable[str]) -> None:
        """Drop some values, wherever they are."""
        for name in names:
            self.pop(name, None)
            self.parked.pop(name, None)
