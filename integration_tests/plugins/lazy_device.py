"""A stand-in for CUDA on a CPU, as unkind as a device may be: work on a stream runs only when somebody waits for it.

Copies go by address. A target is filled with NaN until its copy runs, and a copy whose tensor on the device was freed
too early is counted as a violation; so a missing wait shows as a wrong number or as a violation.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sloth_plugins.offloaded_checkpointing.device import PinError
from sloth_plugins.offloaded_checkpointing.host_memory import HostMemory
from sloth_plugins.offloaded_checkpointing.ring import Ring
from sloth_plugins.offloaded_checkpointing.seam import Rings

LOCK = threading.RLock()
"""One for all streams, since they wait for each other."""


class LazyStream:
    """First in, first out, as late as possible. ``is_host``: the stream on which Python itself computes."""

    def __init__(self, is_host: bool = False) -> None:
        self.is_host = is_host
        self.queue: deque[Callable[[], None]] = deque()
        self.submitted = 0

    def submit(self, work: Callable[[], None]) -> None:
        with LOCK:
            self.submitted += 1
            self.queue.append(work)

    def run(self, until: int) -> None:
        with LOCK:
            while self.queue and self.submitted - len(self.queue) < until:
                self.queue.popleft()()

    def record_event(self) -> LazyEvent:
        return LazyEvent(self, self.submitted)

    def wait_event(self, event: LazyEvent) -> None:
        if self.is_host:
            event.happen()
        else:
            self.submit(event.happen)

    def wait_stream(self, stream: LazyStream) -> None:
        self.wait_event(stream.record_event())


class LazyEvent:
    def __init__(self, stream: LazyStream, position: int) -> None:
        self.stream = stream
        self.position = position

    def happen(self) -> None:
        self.stream.run(self.position)


class LazyDevice:
    """See the module's docstring. ``copies`` counts them by direction; ``pinned`` maps address to bytes."""

    def __init__(self, refuses_to_pin: bool = False) -> None:
        self.outward, self.homeward, self.compute = LazyStream(), LazyStream(), LazyStream(is_host=True)
        self.refuses_to_pin = refuses_to_pin
        self.pinned: dict[int, int] = {}
        self.copies = {"outward": 0, "homeward": 0}
        self.violations: list[str] = []

    def current(self) -> LazyStream:
        return self.compute

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        name = "outward" if stream is self.outward else "homeward"
        on_device = source if name == "outward" else target
        if name == "homeward":
            target.fill_(float("nan"))
        alive, addresses, nbytes = (
            StorageWeakRef(on_device.untyped_storage()),
            _addresses(target, source),
            source.nbytes,
        )

        def work() -> None:
            if alive.expired():
                self.violations.append(f"{name}: the tensor on the device was freed before its copy")
            else:
                ctypes.memmove(*addresses, nbytes)

        self.copies[name] += 1
        stream.submit(work)

    def pin(self, memory: Tensor) -> None:
        if self.refuses_to_pin:
            raise PinError("out of memory (2)")
        assert memory.data_ptr() % 4096 == 0
        assert memory.data_ptr() not in self.pinned
        self.pinned[memory.data_ptr()] = memory.nbytes

    def unpin(self, memory: Tensor) -> None:
        del self.pinned[memory.data_ptr()]

    def synchronize(self) -> None:
        for stream in (self.outward, self.homeward):
            stream.run(stream.submitted)


def make_rings(device: LazyDevice, min_bytes: int = 1, **options: Any) -> Rings:
    """Rings that take CPU tensors of any size; ``options`` are HostMemory's."""
    return Rings(lambda _: Ring(device, HostMemory(device, **options)), min_bytes)


def ring_of(rings: Rings) -> Ring:
    """The ring of the CPU."""
    ring = rings.on(torch.device("cpu"))
    assert ring is not None
    return ring


def _addresses(target: Tensor, source: Tensor) -> tuple[int, int]:
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert target.nbytes == source.nbytes
    return target.data_ptr(), source.data_ptr()
