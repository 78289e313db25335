"""Arena: which bytes of which segment are taken. Bookkeeping alone; it owns no memory."""

from __future__ import annotations

import bisect
from itertools import count
from typing import NamedTuple

ALIGNMENT = 256
"""Blocks start at multiples of this many bytes, which suits every dtype and the copy engines."""


class Block(NamedTuple):
    """``size`` bytes of segment ``segment``, from byte ``offset`` on."""

    segment: int
    offset: int
    size: int


class Arena:
    """First fit over segments of any sizes. Neighbouring gaps merge, so a segment given back whole is whole again.

    A block takes its size rounded up to ``ALIGNMENT`` and no more: there are no size classes.
    """

    def __init__(self) -> None:
        self._ids = count()
        self._sizes: dict[int, int] = {}
        self._gaps: dict[int, list[tuple[int, int]]] = {}

    @property
    def capacity(self) -> int:
        """Bytes of all segments."""
        return sum(self._sizes.values())

    @property
    def used(self) -> int:
        """Bytes of all blocks taken, their alignment included."""
        return self.capacity - sum(end - start for gaps in self._gaps.values() for start, end in gaps)

    def add(self, size: int) -> int:
        """Add an empty segment of ``size`` bytes; returns its number."""
        segment = next(self._ids)
        self._sizes[segment] = size
        self._gaps[segment] = [(0, size)]
        return segment

    def remove(self, segment: int) -> None:
        """Forget an empty segment.

        Raises:
            ValueError: some of its blocks are still taken.
        """
        if not self._is_empty(segment):
            raise ValueError(f"segment {segment} cannot be removed: blocks of it are still taken")
        del self._sizes[segment], self._gaps[segment]

    def empty_below(self, size: int) -> list[int]:
        """Segments without blocks that are too small for a block of ``size`` bytes."""
        need = align(size)
        return [segment for segment in self._sizes if self._sizes[segment] < need and self._is_empty(segment)]

    def take(self, size: int) -> Block | None:
        """The first gap that holds ``size`` bytes, or None where there is none."""
        need = align(size)
        for segment, gaps in self._gaps.items():
            for index, (start, end) in enumerate(gaps):
                if end - start >= need:
                    gaps[index : index + 1] = [(start + need, end)] if end - start > need else []
                    return Block(segment, start, need)
        return None

    def give(self, block: Block) -> None:
        """Take ``block`` back and merge it with the gaps beside it.

        Raises:
            ValueError: the block, or a part of it, is not taken.
        """
        gaps = self._gaps.get(block.segment, [])
        start, end = block.offset, block.offset + block.size
        index = bisect.bisect_left(gaps, (start, end))
        before = gaps[index - 1] if index else None
        after = gaps[index] if index < len(gaps) else None
        taken = 0 <= start < end <= self._sizes.get(block.segment, 0)
        if not taken or (before and before[1] > start) or (after and after[0] < end):
            raise ValueError(f"{block} is not taken: it was given back before, or belongs to another arena")
        first, last = index, index
        if before and before[1] == start:
            first, start = index - 1, before[0]
        if after and after[0] == end:
            last, end = index + 1, after[1]
        gaps[first:last] = [(start, end)]

    def _is_empty(self, segment: int) -> bool:
        return self._gaps[segment] == [(0, self._sizes[segment])]


def align(size: int) -> int:
    """``size`` rounded up to ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT
