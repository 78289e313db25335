"""Linears of a model as the ops take them: plain or adapted by PEFT's LoRA, frozen or trained, dense or in 4 bits.

What a linear is made of is looked up once; its parameters, scales, active adapters and modes are read at each call, as
sharding replaces parameters and PEFT switches adapters while a run goes on. Neither PEFT nor bitsandbytes is imported:
where they are not loaded, no module can be of their making.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import DenseWeight, Weight, Weight4bit
from sloth_kernels.ops.nf4 import Quantized4bit

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LiveLinear:
    """One linear of a model, read anew at each call."""

    __slots__ = ("_As", "_base", "_known", "_layer", "_parts", "module")

    def __init__(self, module: nn.Module, base: _Base, layer: Any) -> None:
        self.module = module
        self._base = base
        self._layer = layer
        self._As: dict[str, nn.Module] = {} if layer is None else layer.lora_A._modules
        self._parts: dict[str, _Parts] = {}
        self._known: LoraLinear | None = None

    @classmethod
    def of(cls, module: nn.Module) -> LiveLinear | str:
        """``module`` as a LiveLinear, or a sentence for a Finding: why its own forward has to run."""
        reason = _tampered(module)
        if reason:
            return reason
        layer = module if _is_lora(module) else None
        if layer is None and hasattr(module, "base_layer"):
            return f"is adapted by {_class_name(module)}, which is no LoRA over a linear"
        bare: Any = module if layer is None else module._modules["base_layer"]
        base = _base_of(bare)
        if isinstance(base, str):
            return base
        live = cls(module, base, layer)
        return (layer is not None and live._unknown_adapter(layer.active_adapters)) or base.obstacle() or live

    @property
    def in_4bit(self) -> bool:
        """Whether the weight is quantised to 4 bits."""
        return isinstance(self._base, _Base4bit)

    def describe(self) -> str:
        """The weight in a few words, for a Finding."""
        return self._base.describe()

    def obstacle(self) -> str | None:
        """What has changed since ``of`` that only the module's own forward can follow; None for nothing."""
        module, layer = self.module, self._layer
        if module._forward_pre_hooks or module._forward_hooks:
            return "has hooks"
        if layer is not None:
            if layer._disable_adapters:
                return "its adapters are disabled"
            if layer.merged_adapters:
                return "its adapters are merged"
            if not getattr(layer, "cast_input_dtype_enabled", True):
                return "PEFT's casts of its input are switched off"
            reason = self._unknown_adapter(layer.active_adapters)
            if reason:
                return reason
        return self._base.obstacle()

    def read(self) -> LoraLinear:
        """Weight, bias and active adapters as they are now; call it where ``obstacle()`` is None.

        The same object as long as nothing but the tensors' values has changed.
        """
        weight, bias_N = self._base.read()
        layer, known, adapters = self._layer, self._known, []
        if layer is not None:
            for name in layer.active_adapters:
                parts = self._parts_of(name)
                if parts is not None:
                    adapters.append(parts.read(layer.scaling[name]))
        if known is None or known.weight is not weight or known.bias_N is not bias_N or not _same(known, adapters):
            known = self._known = LoraLinear(weight, bias_N, adapters)
        return known

    def _parts_of(self, name: str) -> _Parts | None:
        """The modules of an adapter; None where this layer has none of that name."""
        A = self._As.get(name)
        if A is None:
            return None
        parts = self._parts.get(name)
        if parts is None or parts.A is not A:
            layer = self._layer
            parts = _Parts(A, layer.lora_B._modules[name], layer.lora_dropout._modules[name])
            self._parts[name] = parts
        return parts

    def _unknown_adapter(self, names: Any) -> str | None:
        """Why one of the adapters needs PEFT's own path; what was found to be in order is not looked at again."""
        layer = self._layer
        variants = getattr(layer, "lora_variant", None)
        for name in names:
            if variants and name in variants:
                return f"adapter {name!r} is a {type(variants[name]).__name__}, not plain LoRA"
            known = self._parts.get(name)
            if known is None or known.A is not self._As.get(name):
                parts = self._parts_of(name)
                reason = _unusual(name, parts) if parts is not None else None
                if reason:
                    del self._parts[name]
                    return reason
        return None


class _Parts:
    """The modules of one adapter, and what was read of them last."""

    __slots__ = ("A", "B", "_adapter", "_form", "dropout")

    def __init__(self, A: nn.Module, B: nn.Module, dropout: nn.Module) -> None:
        self.A, self.B, self.dropout = A, B, dropout
        self._adapter: Adapter | None = None
        self._form: tuple[Any, ...] = ()

    def read(self, scale: float) -> Adapter:
        """The adapter as it is now: the same object as long as nothing but values has changed."""
        known, dropout = self._adapter, self.dropout
        A_RK: Any = self.A._parameters["weight"]
        B_NR: Any = self.B._parameters["weight"]
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        # Whoever sets ``.data`` may leave the parameter as it is but for its shape and dtype.
        form = A_RK.shape, B_NR.shape, A_RK.dtype, B_NR.dtype, scale, p
        if known is None or known.A_RK is not A_RK or known.B_NR is not B_NR or form != self._form:
            known = self._adapter = Adapter(A_RK, B_NR, scale, p)
            self._form = form
        return known


def _same(known: LoraLinear, adapters: list[Adapter]) -> bool:
    """Whether these are its adapters, object by object."""
    return len(adapters) == len(known.adapters) and all(map(operator.is_, adapters, known.adapters))


def _unusual(name: str, parts: _Parts) -> str | None:
    """What keeps an adapter from being two plain products behind a dropout."""
    modules = parts.A, parts.B, parts.dropout
    for module in (parts.A, parts.B):
        if type(module).forward is not nn.Linear.forward:
            return f"adapter {name!r} has a {_class_name(module)} in place of a linear"
    if parts.A._parameters.get("bias") is not None or parts.B._parameters.get("bias") is not None:
        return f"adapter {name!r} has a bias of its own (lora_bias)"
    if type(parts.dropout) not in (nn.Dropout, nn.Identity):
        return f"adapter {name!r} has a {_class_name(parts.dropout)} in place of a dropout"
    return next((f"in adapter {name!r} a part {reason}" for reason in map(_tampered, modules) if reason), None)


# The weight -----------------------------------------------------------------------------------------------------------


class _Base:
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


class _BaseConv1D(_Base):
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


class _Base4bit(_Base):
    """bitsandbytes' Linear4bit. Without a compute dtype it takes x's, which its own forward would settle on."""

    __slots__ = ("_place",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._place: tuple[Any, ...] = ()

    def _state(self) -> Any:
        """The quantisation's state, which sharding leaves with the module alone."""
        state = getattr(self.module._parameters["weight"], "quant_state", None)
        return getattr(self.module, "quant_state", None) if state is None else state

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


def _base_of(module: nn.Module) -> _Base | str:
    """The linear below all adapters, or why it is none that the ops know."""
    reason = _tampered(module)
    if reason:
        return f"its base layer {reason}"
    forward = type(module).forward
    if forward is _forward_of("bitsandbytes.nn", "Linear4bit"):
        return _checked_4bit(_Base4bit(module))
    if forward is _forward_of("bitsandbytes.nn", "Linear8bitLt"):
        return "its weight is 8-bit: bitsandbytes also rounds the input to 8 bits, as no dense product would"
    conv1d = forward is _forward_of("transformers.pytorch_utils", "Conv1D")
    if forward is not nn.Linear.forward and not conv1d:
        return f"is a {_class_name(module)}, not a linear that the ops know"
    weight = module._parameters.get("weight")
    if weight is None or not _is_plain(weight):
        return f"its weight is {'computed' if weight is None else f'a {_class_name(weight)}'}, not a plain parameter"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}"
    return _BaseConv1D(module) if conv1d else _Base(module)


def _checked_4bit(base: _Base4bit) -> _Base4bit | str:
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
    return base


def _is_plain(weight: torch.Tensor) -> bool:
    """An ordinary parameter, or one that FSDP2 shards until the layer runs."""
    return type(weight) is nn.Parameter or type(weight).__name__ == "DTensor"


# Modules --------------------------------------------------------------------------------------------------------------


def _is_lora(module: nn.Module) -> bool:
    """Whether PEFT's own LoRA forward for linears runs here."""
    forward = type(module).forward
    kinds = [_forward_of("peft.tuners.lora.bnb", name) for name in ("Linear4bit", "Linear8bitLt")]
    kinds.append(_forward_of("peft.tuners.lora.layer", "Linear"))
    return "base_layer" in module._modules and forward in kinds


def _forward_of(module_name: str, class_name: str) -> Any:
    """A class's forward; a value that is no function where its module is not loaded or lacks the class."""
    return getattr(getattr(sys.modules.get(module_name), class_name, None), "forward", module_name)


def _tampered(module: nn.Module) -> str | None:
    """What else takes part in a call of this module than its class's forward."""
    if hasattr(module, "_hf_hook"):
        return "is moved between devices by accelerate"
    if "forward" in vars(module):
        owner = getattr(vars(module)["forward"], "__module__", None) or "another library"
        return f"has a forward that is already replaced, by {owner}"
    return "has hooks" if any(_hooks(module)) else None


def _hooks(module: nn.Module) -> Iterator[Any]:
    return (getattr(module, name, None) for name in HOOKS)


def _class_name(value: object) -> str:
    return type(value).__name__
