"""Where transformers calls its checkpointing function, and how one model instance is given another one.

``gradient_checkpointing_enable`` ends in ``model._set_gradient_checkpointing``, which hands one function to all
modules that carry the attribute ``gradient_checkpointing``; a layer that checkpoints calls
``self._gradient_checkpointing_func(run_the_layer, *inputs)``. The override on the instance lets the original do all
that, then puts a LayerCheckpoint of its own around each planned layer's function. So it survives that the Trainer
enables checkpointing again later, and it needs no look into what the layer passes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sloth_backend.findings import Edits
from sloth_backend.plan import OFFLOAD, RECOMPUTE
from sloth_plugins.offloaded_checkpointing.ring import Handle, Kept, Ring, is_dense

FLAG = "gradient_checkpointing"
FUNCTION = "_gradient_checkpointing_func"
SETTER = "_set_gradient_checkpointing"

MIN_BYTES = 1 << 20
"""Smaller inputs stay on the device: the calls that move one cost more than a copy of 1 MiB at 50 GB/s, 20 us."""

_restore = operator.methodcaller("restore")


def checkpointed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> module, for the modules that can checkpoint themselves, in the order in which they run.

    Their class carries the flag (transformers' GradientCheckpointingLayer); the models around them only hold a copy
    on the instance.
    """
    return {name: module for name, module in model.named_modules() if isinstance(getattr(type(module), FLAG, 0), bool)}


def can_override(model: nn.Module) -> bool:
    """Whether the model sets checkpointing up as transformers does since 4.35."""
    setter = getattr(model, SETTER, None)
    return inspect.ismethod(setter) and "value" not in inspect.signature(setter).parameters


class Rings:
    """The rings of one model, one a device, made when a tensor of that device first comes.

    Args:
        make: the ring for a device; None where tensors on it stay there.
        min_bytes: size from which on an input is offloaded.
    """

    def __init__(self, make: Callable[[torch.device], Ring | None], min_bytes: int = MIN_BYTES) -> None:
        self._make = make
        self._min_bytes = max(1, min_bytes)
        self.depth = 1
        """How many times a layer saves; see the ring."""
        self._rings: dict[torch.device, Ring | None] = {}

    def on(self, device: torch.device) -> Ring | None:
        """The ring of ``device``."""
        if device not in self._rings:
            self._rings[device] = self._make(device)
        return self._rings[device]

    def save(self, inputs: tuple[object, ...], layers_to_come: int) -> dict[int, Handle]:
        """``id`` of each input that a ring takes -> its handle; see ``Ring.save``."""
        tensors: dict[torch.device, dict[int, Tensor]] = {}
        for value in inputs:
            if isinstance(value, Tensor) and self._takes(value):
                tensors.setdefault(value.device, {})[id(value)] = value
        handles: dict[int, Handle] = {}
        for device, here in tensors.items():
            ring = self.on(device)
            if ring is not None:
                ring.depth = self.depth
                handles |= zip(here, ring.save(list(here.values()), layers_to_come), strict=True)
        return handles

    def settle(self) -> None:
        """See ``Ring.settle``."""
        for ring in self._rings.values():
            if ring is not None:
                ring.settle()

    @property
    def bytes_held(self) -> int:
        """Bytes of host memory held at present."""
        return sum(ring.memory.bytes_held for ring in self._rings.values() if ring is not None)

    def _takes(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.nbytes < self._min_bytes:
            return False
        # A leaf that wants a gradient is held by the graph itself: a copy would free nothing.
        return not (tensor.is_leaf and tensor.requires_grad) and not tensor.is_inference() and is_dense(tensor)


class LayerCheckpoint:
    """A layer's checkpointing function: the host's own, with the inputs that it saves held by a ring.

    Both of torch's flavours save a layer's positional inputs as any autograd function does, under the saved tensor
    hooks of the caller; what runs inside the layer either saves nothing (reentrant) or under checkpoint's own hooks.
    """

    def __init__(self, host: Callable[..., Any], rings: Rings, layers_to_come: int) -> None:
        self.host = host
        self.rings = rings
        self.layers_to_come = layers_to_come

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the host's function returns for the same arguments; a compiled model is left to it alone."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.host(function, *args, **kwargs)
        # Before the layer runs, so that the copy has all of its forward to finish.
        with held_by(self.rings, args, self.layers_to_come):
            return self.host(function, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        """A copied or unpickled model checkpoints as its host does: the rings belong to the original."""
        return _host_function, (self.host,)


class Seam:
    """Puts a LayerCheckpoint around the checkpointing function of each planned layer, now and whenever it is set.

    Args:
        model: the model whose ``_set_gradient_checkpointing`` the host calls.
        plan: layer -> the name of its level; any but OFFLOAD's and RECOMPUTE's leaves its function alone.
        rings: where the inputs go.
    """

    def __init__(self, model: nn.Module, plan: Mapping[nn.Module, str], rings: Rings) -> None:
        self.model = weakref.ref(model)
        self.plan = dict(plan)
        self.rings = rings

    def install(self, edits: Edits) -> None:
        """Take effect; whatever has been set by the time of undo, the host's own functions come back."""
        model = self.model()
        assert model is not None
        edits.on_undo(self.unwrap)
        follow_setter(model, self.wrap, edits)
        self.wrap()

    def wrap(self) -> None:
        """Wrap the functions that the host has set on layers that are to checkpoint."""
        self.unwrap()
        layers = [layer for layer in self.plan if getattr(layer, FLAG) and FUNCTION in vars(layer)]
        to_come = sum(self.plan[layer] == OFFLOAD.name for layer in layers)
        for layer in layers:
            name, host = self.plan[layer], vars(layer)[FUNCTION]
            offloads = name == OFFLOAD.name
            if offloads or name == RECOMPUTE.name:
                setattr(layer, FUNCTION, LayerCheckpoint(host, self.rings, to_come if offloads else 0))
            to_come -= offloads

    def unwrap(self) -> None:
        """Give every layer the host's own function back."""
        for layer in self.plan:
            function = vars(layer).get(FUNCTION)
            if isinstance(function, LayerCheckpoint) and function.rings is self.rings:
                setattr(layer, FUNCTION, function.host)


def host_bytes(model: nn.Module) -> int:
    """Bytes of pinned host memory that hold, or are kept ready for, the layer inputs of ``model``."""
    functions = (vars(module).get(FUNCTION) for module in model.modules())
    rings = {function.rings for function in functions if isinstance(function, LayerCheckpoint)}
    return sum(ring.bytes_held for ring in rings)


def held_by(rings: Rings, inputs: tuple[object, ...], layers_to_come: int) -> saved_tensors_hooks:
    """Save ``inputs`` with ``rings`` now; what autograd saves of them under these hooks is a ring's handle."""
    handles = rings.save(inputs, layers_to_come)

    def pack(tensor: Tensor) -> Handle | Kept:
        handle = handles.get(id(tensor))
        return handle if handle is not None and handle.is_for(tensor) else Kept(tensor)

    return saved_tensors_hooks(pack, _restore)


def follow_setter(model: nn.Module, action: Callable[[], None], edits: Edits) -> None:
    """Run ``action`` whenever the host has set checkpointing functions on the layers of ``model``."""
    original, owner = getattr(model, SETTER).__func__, weakref.ref(model)

    @functools.wraps(original)
    def _set_gradient_checkpointing(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A deep copy of the model brings this method along, but the action is about the original's layers.
        if self is owner():
            action()

    edits.set(model, SETTER, types.MethodType(_set_gradient_checkpointing, model))


def _host_function(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
