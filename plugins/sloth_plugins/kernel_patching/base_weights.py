"""The weights of a model's linears as the ops take them: dense ones, a Conv1D's, bitsandbytes' in 4 bits."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sloth_kernels.frozen_weight import DenseWeight, Weight, Weight4bit
from sloth_kernels.ops.nf4 import Quantized4bit
from sloth_plugins.kernel_patching.modules import class_name, forward_of, tampered


class Base:
    """A linear without adapters. Subclasses say what its weight is."""

    __slots__ = ("_form", "_parameter", "_weight", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameter: torch.Tensor | None = None
        self._form: tuple[Any, ...] = ()
        self._weight: Any = None

    def describe(self) -> str:
        """The weight in a few words."""
        parameter: Any = self.module._parameters["weight"]
        trained = "trained" if parameter.requires_grad else "frozen"
        return f"{trained} {str(parameter.dtype).removeprefix('torch.')} weight"

    def forget(self) -> None:
        """Keep no tensor."""
        self._parameter = self._weight = None
        self._form = ()

    def obstacle(self) -> str | None:
        """Why the weight cannot be read now."""
        if self.module._parameters.get("weight") is None:
            return "its weight is no parameter"
        return None

    def read(self) -> tuple[Weight, torch.Tensor | None]:
        """Weight and bias as they are now."""
        parameters = self.module._parameters
        parameter: Any = parameters["weight"]
        form = parameter.shape, parameter.dtype, parameter.requires_grad
        if parameter is not self._parameter or form != self._form:
            self._weight, self._parameter, self._form = DenseWeight(parameter), parameter, form
        return self._weight, parameters["bias"]


class BaseConv1D(Base):
    """GPT-2's linear, whose weight is (K, N)."""

    __slots__ = ()

    def obstacle(self) -> str | None:
        """A gradient would be that of a view."""
        parameter = self.module._parameters.get("weight")
        if parameter is not None and parameter.requires_grad:
            return "is a Conv1D whose weight trains"
        return super().obstacle()

    def read(self) -> tuple[Weight, torch.Tensor | None]:
        """As a transposed view."""
        parameters: Any = self.module._parameters
        return DenseWeight(parameters["weight"].t()), parameters["bias"]


class Base4bit(Base):
    """bitsandbytes' Linear4bit. Without a compute dtype it takes x's, which its own forward would settle on."""

    __slots__ = ("_place",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._place: tuple[Any, ...] = ()

    def _state(self) -> Any:
        """The quantisation's state, which sharding leaves with the module alone."""
        state = getattr(self.module._parameters["weight"], "quant_state", None)
        return getattr(self.module, "quant_state", None) if state is None else state

    def forget(self) -> None:
        """Keep no tensor."""
        super().forget()
        self._place = ()

    def describe(self) -> str:
        """Type, and whether absmax is quantised too."""
        state = self._state()
        return f"frozen 4-bit weight ({state.quant_type}{', double-quantised' if state.nested else ''})"

    def obstacle(self) -> str | None:
        """What bitsandbytes does to a weight that is not on its device yet, or that a CPU has packed anew."""
        parameter = self.module._parameters.get("weight")
        if parameter is None:
            return "its weight is no parameter"
        state = self._state()
        if state is None:
            return "its weight is not quantised yet: bitsandbytes does so when the model moves to its device"
        if vars(state).get("packing_format_for_cpu"):
            return "bitsandbytes has packed its weight for the CPU's own kernels"
        return None

    def read(self) -> tuple[Weight, torch.Tensor | None]:
        """The tensors behind it, looked up again only where one of them has moved."""
        module: Any = self.module
        parameter, state = module._parameters["weight"], self._state()
        # bitsandbytes' parameters intercept what is asked of them, which costs more than the answer.
        with torch._C.DisableTorchFunctionSubclass():
            # Of a weight that is gathered for each use, the memory comes and goes; its storage is the same.
            storage = parameter.untyped_storage()._cdata, parameter.storage_offset()
            place = (storage, id(state.absmax), module.compute_dtype)
        if place != self._place:
            self._weight, self._place = Weight4bit(quantized_of(parameter, state), module.compute_dtype), place
        return self._weight, module._parameters["bias"]


def quantized_of(packed: torch.Tensor, state: Any) -> Quantized4bit:
    """The plain tensors behind a weight of bitsandbytes and its ``QuantState``."""
    nested = state.state2 if state.nested else None
    return Quantized4bit(
        packed.detach().as_subclass(torch.Tensor),
        state.absmax,
        _code(state.quant_type, packed.device),
        tuple(state.shape),
        state.blocksize,
        nested.absmax if nested else None,
        nested.code if nested else None,
        state.offset if nested else None,
        nested.blocksize if nested else 256,
    )


@lru_cache
def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type, float32. The state's own copy is rounded where a model was loaded in 16 bits;
    bitsandbytes' kernels do not read it."""
    return sys.modules["bitsandbytes"].functional.get_4bit_type(quant_type, device=device).float()


def base_of(module: nn.Module) -> Base | str:
    """The linear below all adapters, or why it is none that the ops know."""
    reason = tampered(module)
    if reason:
        return f"its base layer {reason}"
    forward = type(module).forward
    if forward is forward_of("bitsandbytes.nn", "Linear4bit"):
        return _checked_4bit(Base4bit(module))
    if forward is forward_of("bitsandbytes.nn", "Linear8bitLt"):
        return "its weight is 8-bit: bitsandbytes also rounds the input to 8 bits, as no dense product would"
    conv1d = forward is forward_of("transformers.pytorch_utils", "Conv1D")
    if forward is not nn.Linear.forward and not conv1d:
        return f"is a {class_name(module)}, not a linear that the ops know"
    weight = module._parameters.get("weight")
    if weight is None or not _is_plain(weight):
        return f"its weight is {'computed' if weight is None else f'a {class_name(weight)}'}, not a plain parameter"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}"
    return BaseConv1D(module) if conv1d else Base(module)


def _checked_4bit(base: Base4bit) -> Base4bit | str:
    """Read once, so that a layout the op does not take shows before anything is patched."""
    reason = base.obstacle()
    if reason:
        return reason
    if base.module._parameters["weight"].requires_grad:  # type: ignore[union-attr]
        return "its 4-bit weight requires a gradient"
    try:
        base.read()
    except ValueError as error:
        return f"its 4-bit weight does not fit: {error}"
    base.forget()
    return base


def _is_plain(weight: torch.Tensor) -> bool:
    """An ordinary parameter, or one that FSDP2 shards until the layer runs."""
    return type(weight) is nn.Parameter or type(weight).__name__ == "DTensor"
