"""The ring: layer inputs leave for pinned host memory in forward and are back ahead of their backward.

Three streams take part: the caller's, on which the model computes, and two of the device's own. The input x of layer
i takes these steps, none of which blocks the host:

    forward   layer i     outward waits until x is computed and copies it; x is held, so its memory is not reused
              layer i+1   the compute stream waits for that copy, which had all of layer i to finish; x is let go
    backward  layer i+1   homeward begins to copy x back, beside this layer's recompute and backward
              layer i     the compute stream waits for that copy; the same is begun for layer i-1

So the device holds one input in each direction, whatever the number of layers. Where a layer sends several values
away, one after the other, ``depth`` says how many: each has the time of a whole layer for its way out, and as many are
held; home come ``AHEAD`` at a time. Device memory is always taken from
the compute stream's own pool and goes back to it, behind an event where a copy may still touch it;
``Tensor.record_stream`` would delay its reuse by an unknown time.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sloth_plugins.offloaded_checkpointing.arena import Block
from sloth_plugins.offloaded_checkpointing.device import Device, Stream
from sloth_plugins.offloaded_checkpointing.host_memory import HostMemory

AHEAD = 2
"""How many values are on their way home at most, where a layer has sent several away: they are needed one after the
other, in the time of a whole layer, and each takes memory from when it is sent for."""

Handles = tuple["weakref.ref[Handle]", ...]


class Kept:
    """A saved tensor that stays where it is, with the check for in-place changes that autograd makes without hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # An alias without history: the graph keeps this object, so it must not keep the graph.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def restore(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was modified in place since it was saved.
        """
        if self.is_modified():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"input of a checkpointed layer, {self.tensor.dtype} of shape {tuple(self.tensor.shape)}, is at "
                f"version {self.tensor._version}; expected version {self.version}. Modify a clone of it instead."
            )
        return self.tensor

    def is_modified(self) -> bool:
        """Whether the tensor was modified in place since it was saved."""
        return self.tensor._version != self.version


class Handle:
    """What autograd saves in place of a layer's input. When it dies, its host memory is free again.

    Attributes:
        source: the input on the device; None once its copy on the host has taken its place.
        block: its place in host memory; None where it stays on the device.
        copied: the event of the copy to the host.
        arrived: the copy back on the device, its event and the stream of its memory; set from prefetch to use.
        previous: the handles of the layer that ran before, whose backward comes next.
        shared: several layers have it as their input.
    """

    __slots__ = (
        "__weakref__",
        "arrived",
        "block",
        "copied",
        "layout",
        "origin",
        "previous",
        "ring",
        "shared",
        "source",
        "stream",
        "version",
    )

    def __init__(self, ring: Ring, tensor: Tensor, previous: Handles) -> None:
        self.block: Block | None = None
        self.copied: Any = None
        self.arrived: tuple[Tensor, Any, Stream] | None = None
        self.source: Kept | None = None
        self.shared = False
        self.ring = ring
        self.previous = previous
        self.stream = ring.device.current()
        self.origin = weakref.ref(tensor)
        self.version = tensor._version
        self.layout = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self.source = Kept(tensor)

    def restore(self) -> Tensor:
        """The tensor as it was saved: values, shape, strides, dtype and device; raises as ``Kept.restore`` does."""
        return self.ring.restore(self)

    def is_for(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the very tensor that was saved, unchanged since."""
        return self.origin() is tensor and tensor._version == self.version

    def __del__(self) -> None:
        # A copy may still read or write device memory that goes back to its pool now: what comes after must wait.
        if self.source is not None and self.copied is not None:
            self.stream.wait_event(self.copied)
        if self.arrived is not None:
            _, event, stream = self.arrived
            stream.wait_event(event)
        if self.block is not None:
            self.ring.memory.give(self.block)


class Ring:
    """Saves and restores the layer inputs of one model on one device; see the module's docstring for how.

    Safe with several threads: autograd runs backward on one of its own per device.
    """

    def __init__(self, device: Device, memory: HostMemory) -> None:
        self.device = device
        self.memory = memory
        self.depth = 1
        self._lock = threading.Lock()
        self._last: Handles = ()
        self._leaving: deque[Handles] = deque()
        self._by_id: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()

    def save(self, tensors: Sequence[Tensor], layers_to_come: int) -> list[Handle]:
        """Handles for the inputs of the layer that is about to run, in order.

        Args:
            tensors: floating tensors, not empty, without overlap or holes, on this ring's device.
            layers_to_come: how many layers of this forward, this one included, will offload their inputs; 0 where
                those of this one stay on the device.
        """
        with self._lock:
            while len(self._leaving) >= self.depth:
                for earlier in _alive(self._leaving.popleft()):
                    self._let_go(earlier)
            handles = [self._handle(tensor, layers_to_come) for tensor in tensors]
            self._last = tuple(weakref.ref(handle) for handle in handles)
            self._leaving.append(self._last)
            return handles

    def settle(self) -> None:
        """Let go of everything that was sent away; for when a layer has run since that sends nothing."""
        with self._lock:
            while self._leaving:
                for earlier in _alive(self._leaving.popleft()):
                    self._let_go(earlier)

    def restore(self, handle: Handle) -> Tensor:
        """The tensor of ``handle``; besides, those that backward needs next are sent on their way."""
        with self._lock:
            tensor = handle.source.restore() if handle.source else self._arrival(handle)
            # Out of memory here is no failure yet: they are fetched when they are needed, when there may be more.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._fetch_before(handle)
            return tensor

    def _fetch_before(self, handle: Handle) -> None:
        """Send for what a few calls of ``save`` before ``handle``'s sent away, the latest first."""
        coming = handle.previous
        for _ in range(min(self.depth, AHEAD)):
            earlier = list(_alive(coming))
            for one in earlier:
                self._fetch(one)
            coming = earlier[0].previous if earlier else ()

    def _handle(self, tensor: Tensor, layers_to_come: int) -> Handle:
        known = self._by_id.get(id(tensor))
        if known is not None and known.is_for(tensor):
            # An encoder's output, a bias: without us it would stay on the device once, for all layers. So it does.
            known.shared = True
            known.source = known.source or Kept(tensor)
            return known
        handle = Handle(self, tensor, self._last)
        self._by_id[id(tensor)] = handle
        if layers_to_come:
            self._send(handle, layers_to_come)
        return handle

    def _send(self, handle: Handle, layers_to_come: int) -> None:
        assert handle.source is not None
        source = _flat(handle.source.tensor)
        handle.block = self.memory.take(source.nbytes, layers_to_come)
        if handle.block is None:
            return
        outward = self.device.outward
        outward.wait_stream(handle.stream)
        # The block's last tenant may still be on its way back.
        outward.wait_stream(self.device.homeward)
        self.device.copy(self.memory.view(handle.block, source.nbytes).view(source.dtype), source, outward)
        handle.copied = outward.record_event()

    def _let_go(self, handle: Handle) -> None:
        if handle.source is None or handle.copied is None or handle.shared:
            return
        handle.stream.wait_event(handle.copied)
        # Where it was modified in place, perhaps before it was copied, it is kept, so that restoring it complains.
        if not handle.source.is_modified():
            handle.source = None

    def _fetch(self, handle: Handle) -> None:
        if handle.source is not None or handle.arrived is not None or handle.block is None:
            return
        shape, strides, dtype, device = handle.layout
        compute, homeward = self.device.current(), self.device.homeward
        target = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        # Its memory may still be in use by what the compute stream was given before.
        homeward.wait_stream(compute)
        homeward.wait_event(handle.copied)
        self.device.copy(_flat(target), self.memory.view(handle.block, target.nbytes).view(dtype), homeward)
        handle.arrived = (target, homeward.record_event(), compute)

    def _arrival(self, handle: Handle) -> Tensor:
        self._fetch(handle)
        assert handle.arrived is not None
        (tensor, event, owner), handle.arrived = handle.arrived, None
        compute = self.device.current()
        compute.wait_event(event)
        if compute != owner:
            tensor.record_stream(compute)  # type: ignore[arg-type]
        return tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's entries fill one stretch of memory, each place once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one dimension, so that copying it is one transfer."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _alive(handles: Handles) -> Iterable[Handle]:
    return (handle for handle in (reference() for reference in handles) if handle is not None)
