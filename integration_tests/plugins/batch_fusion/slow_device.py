"""A CPU that plays a device which the host must not wait for: what would wait raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from sloth_plugins.batch_fusion import bookkeeping, later

WAITS = (Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist, Tensor.cpu)


class FakeCopy:
    """A copy that arrives when it is told to; who reads it earlier has waited."""

    def __init__(self, value: Tensor, arrived: bool = False) -> None:
        self.value, self.arrived = value, arrived

    def here(self) -> bool:
        return self.arrived

    def read(self) -> Tensor:
        assert self.arrived, "the host waited for a number of the device"
        return self.value


class SlowDevice(TorchFunctionMode):
    """While active, no number leaves the device. The host's are tensors made without a ``device``, and what is of them.

    Attributes:
        copies: all that were sent home.
        passes: how many forwards it has seen followed by backward.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.copies: list[FakeCopy] = []
        self.passes = 0
        self.hosts = WeakTensorKeyDictionary()
        patch.setattr(bookkeeping, "DEVICES", ("cpu",))
        patch.setattr(later.Copy, "of", self._send)

    def _send(self, scalar: Tensor) -> FakeCopy:
        self.copies.append(FakeCopy(scalar.detach().clone()))
        return self.copies[-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        of_host = all(t in self.hosts for t in tensors) if tensors else "device" not in kwargs
        makes = func is torch.tensor
        assert of_host or not (makes or func in WAITS), f"the host waited in {func}"
        result = func(*args, **kwargs)
        if of_host and isinstance(result, Tensor) and (tensors or makes):
            self.hosts[result] = True
        return result

    def watch(self, trainer: Any) -> None:
        """Be active from the end of each forward to the beginning of backward; copies arrive after it."""
        backward = trainer.accelerator.backward

        def launch(*args: Any, **kwargs: Any) -> None:
            self.__exit__(None, None, None)
            self.passes += 1
            backward(*args, **kwargs)
            for copy in self.copies:
                copy.arrived = True

        trainer.accelerator.backward = launch
        trainer.model.register_forward_hook(lambda *_: self.__enter__() and None)
