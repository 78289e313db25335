"""The few things the ring asks of a device: two streams of its own, copies on them, and pinned host memory."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor


class PinError(RuntimeError):
    """The driver would not pin a piece of host memory; the message is its own."""


class Stream(Protocol):
    """Work in order; ``torch.cuda.Stream`` is one. Waiting never blocks the caller, only what is queued after it."""

    def wait_event(self, event: Any, /) -> None:
        """Everything queued from now on runs after ``event``."""
        ...

    def wait_stream(self, stream: Any, /) -> None:
        """Everything queued from now on runs after what ``stream`` holds now."""
        ...

    def record_event(self) -> Any:
        """An event that happens when everything queued so far is done."""
        ...


class Device(Protocol):
    """One device.

    Attributes:
        outward: the stream of copies to the host.
        homeward: the stream of copies to the device.
    """

    outward: Stream
    homeward: Stream

    def current(self) -> Stream:
        """The stream the caller computes on."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        """Queue ``target.copy_(source)`` on ``stream``; returns at once where the host memory is pinned."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Pin host memory, a contiguous uint8 tensor that starts on a page.

        Raises:
            PinError: the driver refused.
        """
        ...

    def unpin(self, memory: Tensor) -> None:
        """Undo ``pin``."""
        ...

    def synchronize(self) -> None:
        """Block until both streams are idle."""
        ...


class CudaDevice:
    """A CUDA device as the ring sees it; memory is pinned by the CUDA runtime's cudaHostRegister."""

    PORTABLE = 1
    """cudaHostRegisterPortable: the memory counts as pinned for every device's context."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outward: Stream = torch.cuda.Stream(device)
        self.homeward: Stream = torch.cuda.Stream(device)

    def current(self) -> Stream:
        """See ``Device``."""
        return torch.cuda.current_stream(self.device)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """See ``Device``."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def pin(self, memory: Tensor) -> None:
        """See ``Device``."""
        cudart: Any = torch.cuda.cudart()
        result = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, self.PORTABLE)
        if int(result) != 0:
            self._clear_error()
            raise PinError(f"{cudart.cudaGetErrorString(result)} (cudaHostRegister returned {int(result)})")

    def unpin(self, memory: Tensor) -> None:
        """See ``Device``."""
        cudart: Any = torch.cuda.cudart()
        if int(cudart.cudaHostUnregister(memory.data_ptr())) != 0:
            self._clear_error()

    def synchronize(self) -> None:
        """See ``Device``."""
        for stream in (self.outward, self.homeward):
            stream.synchronize()  # type: ignore[attr-defined]

    def _clear_error(self) -> None:
        # The runtime remembers a failed call, and PyTorch would report it at the next kernel launch as if that had
        # failed. A launch whose complaint is swallowed here makes it forget.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
