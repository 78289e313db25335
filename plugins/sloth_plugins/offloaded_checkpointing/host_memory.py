"""Pinned host memory that grows by what is needed, is reused, and goes back to the system when its owner does.

PyTorch's own pinned allocator rounds every block up to a power of two, up to twice what is needed. Here pages come
from mmap, are pinned in segments of many blocks, and an Arena hands out their exact bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sloth_backend.budget import HOST_RESERVE_BYTES, available_bytes
from sloth_plugins.offloaded_checkpointing.arena import Arena, Block, align
from sloth_plugins.offloaded_checkpointing.device import Device, PinError

SEGMENT_BYTES = 2 << 30
"""A segment's size at most, where one block is not larger: pinning it stalls the host for a second at most."""

# Pinning walks the pages one by one: 2 MiB pages, where the system grants them, make 512 times fewer of them. And the
# kernel copies pinned private pages for every forked child (a data loader's worker, say) unless they are wiped on fork.
_MADV_WIPEONFORK = 18
_ADVICE = (mmap.MADV_HUGEPAGE, _MADV_WIPEONFORK) if sys.platform == "linux" else ()
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class HostMemory:
    """Blocks of pinned host memory for one device. ``take`` and ``view`` want one caller at a time; ``give`` does not.

    Args:
        device: pins the memory and is synchronised before any of it goes.
        segment_bytes: size of a segment at most, see ``SEGMENT_BYTES``.
        available: bytes the machine can still give, or None where it does not say.
    """

    def __init__(
        self,
        device: Device,
        segment_bytes: int = SEGMENT_BYTES,
        available: Callable[[], int | None] | None = None,
    ) -> None:
        self._device = device
        self._segment_bytes = segment_bytes
        self._available = available or available_bytes
        self._arena = Arena()
        self._segments: dict[int, Segment] = {}
        self._returned: deque[Block] = deque()
        self._told: set[str] = set()
        weakref.finalize(self, _release, self._segments, device, os.getpid())

    @property
    def bytes_held(self) -> int:
        """Bytes of host memory held for blocks, taken or not."""
        return self._arena.capacity

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks taken now."""
        self._collect()
        return self._arena.used

    def take(self, nbytes: int, blocks_to_come: int = 1) -> Block | None:
        """A block of ``nbytes``, or None where the host has no memory for it.

        Args:
            nbytes: bytes wanted.
            blocks_to_come: how many blocks of this size will be wanted, this one included, before any is given back;
                where memory must grow, it grows by that many at once.
        """
        self._collect()
        block = self._arena.take(nbytes)
        if block is None and self._grow(nbytes, blocks_to_come):
            block = self._arena.take(nbytes)
        return block

    def view(self, block: Block, nbytes: int) -> Tensor:
        """The first ``nbytes`` of ``block``: uint8, 1-D, contiguous."""
        return self._segments[block.segment].memory.narrow(0, block.offset, nbytes)

    def give(self, block: Block) -> None:
        """Give ``block`` back. Safe from any thread and from a destructor: it takes no lock."""
        self._returned.append(block)

    def _collect(self) -> None:
        while self._returned:
            self._arena.give(self._returned.popleft())

    def _grow(self, nbytes: int, blocks: int) -> bool:
        for segment in self._arena.empty_below(nbytes):
            self._drop(segment)
        fitting = max(1, min(blocks, self._segment_bytes // align(nbytes)))
        if self._add(fitting * align(nbytes)) or (fitting > 1 and self._add(align(nbytes))):
            return True
        self._tell("the host has no memory left for offloaded layer inputs; those without stay on the device")
        return False

    def _add(self, nbytes: int) -> bool:
        available = self._available()
        if available is not None and nbytes > available - HOST_RESERVE_BYTES:
            return False
        memory = map_pages(nbytes)
        if memory is None:
            return False
        self._segments[self._arena.add(memory.nbytes)] = Segment(memory, self._pin(memory))
        return True

    def _pin(self, memory: Tensor) -> bool:
        try:
            self._device.pin(memory)
        except PinError as error:
            self._tell(
                f"host memory for offloaded layer inputs could not be pinned: {error}. Copies go through pageable "
                "memory, which is slower and stalls the host; checkpointing='host' does without."
            )
            return False
        return True

    def _drop(self, segment: int) -> None:
        self._arena.remove(segment)
        _release({segment: self._segments.pop(segment)}, self._device, os.getpid())

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


class Segment:
    """``memory`` (uint8, page-aligned) and whether it is pinned."""

    __slots__ = ("memory", "pinned")

    def __init__(self, memory: Tensor, pinned: bool) -> None:
        self.memory = memory
        self.pinned = pinned


def map_pages(nbytes: int) -> Tensor | None:
    """``nbytes``, rounded up to whole pages, of fresh zeroed memory as uint8; None where the system refuses.

    The pages go back to the system as soon as the last tensor on them dies. A forked child sees zeros instead.
    """
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        pages = mmap.mmap(-1, size, **_PRIVATE)
    except (OSError, OverflowError):
        return None
    for advice in _ADVICE:
        with contextlib.suppress(OSError):
            pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _release(segments: dict[int, Segment], device: Device, owner: int) -> None:
    """Unpin and free ``segments``; in a forked child, which has no CUDA context, only free them."""
    if segments and os.getpid() == owner:
        with contextlib.suppress(RuntimeError):
            device.synchronize()
        for segment in segments.values():
            if segment.pinned:
                device.unpin(segment.memory)
    segments.clear()
