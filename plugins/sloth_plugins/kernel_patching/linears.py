"""Linears of a model as the ops take them: plain or adapted by PEFT's LoRA, frozen or trained, dense or in 4 bits.

What a linear is made of is looked up once; its parameters, scales, active adapters and modes are read at each call, as
sharding replaces parameters and PEFT switches adapters while a run goes on. Neither PEFT nor bitsandbytes is imported:
where they are not loaded, no module can be of their making.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_plugins.kernel_patching.base_weights import Base, Base4bit, base_of
from sloth_plugins.kernel_patching.modules import class_name, forward_of, tampered


class LiveLinear:
    """One linear of a model, read anew at each call."""

    __slots__ = ("_As", "_base", "_known", "_layer", "_parts", "module")

    def __init__(self, module: nn.Module, base: Base, layer: Any) -> None:
        self.module = module
        self._base = base
        self._layer = layer
        self._As: dict[str, nn.Module] = {} if layer is None else layer.lora_A._modules
        self._parts: dict[str, _Parts] = {}
        self._known: LoraLinear | None = None

    @classmethod
    def of(cls, module: nn.Module) -> LiveLinear | str:
        """``module`` as a LiveLinear, or a sentence for a Finding: why its own forward has to run."""
        reason = tampered(module)
        if reason:
            return reason
        layer = module if _is_lora(module) else None
        if layer is None and hasattr(module, "base_layer"):
            return f"is adapted by {class_name(module)}, which is no LoRA over a linear"
        bare: Any = module if layer is None else module._modules["base_layer"]
        base = base_of(bare)
        if isinstance(base, str):
            return base
        live = cls(module, base, layer)
        return (layer is not None and live._unknown_adapter(layer.active_adapters)) or base.obstacle() or live

    @property
    def in_4bit(self) -> bool:
        """Whether the weight is quantised to 4 bits."""
        return isinstance(self._base, Base4bit)

    def describe(self) -> str:
        """The weight in a few words, for a Finding."""
        return self._base.describe()

    def obstacle(self) -> str | None:
        """What has changed since ``of`` that only the module's own forward can follow; None for nothing."""
        module, layer = self.module, self._layer
        if module._forward_pre_hooks or module._forward_hooks:
            return "has hooks"
        if layer is not None:
            if layer._modules["base_layer"] is not self._base.module:
                return "its base layer was replaced"
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

    def forget(self) -> None:
        """Keep no tensor until the next ``read``: those that there are now may be about to be sharded."""
        self._base.forget()
        self._known = None
        for parts in self._parts.values():
            parts.forget()

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

    def forget(self) -> None:
        """Keep no tensor."""
        self._adapter, self._form = None, ()

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
            return f"adapter {name!r} has a {class_name(module)} in place of a linear"
    if parts.A._parameters.get("bias") is not None or parts.B._parameters.get("bias") is not None:
        return f"adapter {name!r} has a bias of its own (lora_bias)"
    if type(parts.dropout) not in (nn.Dropout, nn.Identity):
        return f"adapter {name!r} has a {class_name(parts.dropout)} in place of a dropout"
    return next((f"in adapter {name!r} a part {reason}" for reason in map(tampered, modules) if reason), None)


def _is_lora(module: nn.Module) -> bool:
    """Whether PEFT's own LoRA forward for linears runs here."""
    forward = type(module).forward
    kinds = [forward_of("peft.tuners.lora.bnb", name) for name in ("Linear4bit", "Linear8bitLt")]
    kinds.append(forward_of("peft.tuners.lora.layer", "Linear"))
    return "base_layer" in module._modules and forward in kinds
