"""Numbers of the device that are still on their way to the host.

``Copy`` sends a scalar home without waiting; ``Later`` is the number that it will be. It waits when somebody looks at
it. Until then it can be kept, and added to: ``sum`` of several that have not arrived is another one.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sloth_kernels.known import Number


class Copy(NamedTuple):
    """A scalar on its way to pinned memory, and the event of its arrival."""

    value: Tensor
    arrived: torch.cuda.Event

    @classmethod
    def of(cls, scalar: Tensor) -> Copy:
        """Send ``scalar``, one number of a CUDA device, without waiting."""
        value = torch.empty((), dtype=scalar.dtype, pin_memory=True)
        value.copy_(scalar.detach().reshape(()), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(scalar.device))
        return cls(value, arrived)

    def here(self) -> bool:
        """Whether to read it is to wait for nothing."""
        return self.arrived.query()

    def read(self) -> Tensor:
        """The scalar, when it is there."""
        self.arrived.synchronize()
        return self.value


def _asked(question: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: question(self.value, *map(plain, others))


def _asked_of(question: Callable[..., Any]) -> Callable[..., Any]:
    """With the number on the right."""
    return lambda self, other: question(other, self.value)


class Later:
    """A number of type ``kind``: the sum of ``terms``, from left to right as Python adds.

    To ``isinstance`` it is of that type. Copies of it, pickled ones too, are plain numbers.
    """

    def __init__(self, kind: type, terms: Sequence[Any]) -> None:
        self._kind, self._terms = kind, tuple(terms)

    @classmethod
    def of(cls, scalar: Tensor) -> Later:
        """What ``scalar.item()`` gives."""
        kind = float if scalar.dtype.is_floating_point else bool if scalar.dtype is torch.bool else int
        return cls(kind, (Copy.of(scalar),))

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return self._kind

    @property
    def value(self) -> Number:
        """The number, when it is there."""
        self._terms = (functools.reduce(operator.add, map(_read, self._terms)),)
        return self._terms[0]

    def here(self) -> bool:
        """Whether to look at it is to wait for nothing."""
        return all(map(_here, self._terms))

    def __add__(self, other: Any) -> Any:
        return _sum(self, other, self._terms) if type(other) in ADDED else self.value + other

    def __radd__(self, other: Any) -> Any:
        return _sum(other, self, (other,)) if type(other) in ADDED else other + self.value

    __lt__, __le__, __gt__, __ge__ = map(_asked, (operator.lt, operator.le, operator.gt, operator.ge))
    __eq__, __ne__, __hash__, __bool__ = map(_asked, (operator.eq, operator.ne, hash, bool))
    __sub__, __mul__, __truediv__ = map(_asked, (operator.sub, operator.mul, operator.truediv))
    __rsub__, __rmul__, __rtruediv__ = map(_asked_of, (operator.sub, operator.mul, operator.truediv))
    __floordiv__, __mod__, __divmod__, __pow__ = map(_asked, (operator.floordiv, operator.mod, divmod, pow))
    __rfloordiv__, __rmod__, __rdivmod__, __rpow__ = map(_asked_of, (operator.floordiv, operator.mod, divmod, pow))
    __neg__, __pos__, __abs__, __round__ = map(_asked, (operator.neg, operator.pos, abs, round))
    __float__, __int__, __index__, __complex__ = map(_asked, (float, int, operator.index, complex))
    __trunc__, __floor__, __ceil__ = map(_asked, (math.trunc, math.floor, math.ceil))
    __repr__, __str__, __format__ = map(_asked, (repr, str, format))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # protocols that numbers do not have; to ask for them is not to ask for the number
            raise AttributeError(name)
        return getattr(self.value, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.value), (self.value,)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.array(self.value, *args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})


ADDED = (Later, float, int, bool)


def plain(value: Any) -> Any:
    """``value`` with plain numbers for those that came later, in lists and tuples too."""
    if type(value) is Later:
        return value.value
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _sum(left: Any, right: Any, terms: tuple[Any, ...]) -> Any:
    """``left``, the sum of ``terms``, and ``right``; what has arrived from the left on is kept as one number."""
    terms = (*terms, right)
    count = next((i for i, term in enumerate(terms) if not _here(term)), len(terms))
    arrived = [functools.reduce(operator.add, map(_read, terms[:count]))] if count else []
    waiting = terms[count:]
    return Later(type(left.__class__() + right.__class__()), (*arrived, *waiting)) if waiting else arrived[0]


def _here(term: Any) -> bool:
    return type(term) in (float, int, bool) or term.here()


def _read(term: Any) -> Number:
    return plain(term) if type(term) in ADDED else term.read().item()
