"""Batches of the next step, fetched while the device is busy with this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """An iterator that can be told to fetch; what it gives, and what it raises, comes in the order it had."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator = iterator
        self._fetched: deque[Any] = deque()
        self._failure: Exception | None = None

    def fetch(self, count: int, ended: Callable[[], bool] = lambda: False) -> None:
        """Have ``count`` items at hand, or as many as there are; a failure is kept for when its item is asked for.

        ``ended`` says that the last item has been given: loaders that know it are not asked for one more, upon which
        they would take their leave of the host.
        """
        while len(self._fetched) < count and self._failure is None and not ended():
            try:
                self._fetched.append(next(self.iterator))
            except Exception as failure:
                self._failure = failure

    @property
    def fetched(self) -> tuple[Any, ...]:
        """The items at hand, the next one first."""
        return tuple(self._fetched)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._fetched:
            return self._fetched.popleft()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return next(self.iterator)
