"""Is the gradient of what the first layer reads anybody's wish?

Hosts that checkpoint have a frozen embedding's output require a gradient (``enable_input_require_grads``): reentrant
checkpointing trains nothing otherwise. A program needs no such thing, and nobody reads that gradient; but it takes the
product of queries, keys and values with their weights, a norm's backward and a tensor of the size of the input. The
hook stays where it is, for layers and calls that are no program.

Whoever else could hold the tensor, and read its gradient later, is one of these: the caller, who embedded it himself or
asked for the hidden states; hooks on the embedding, on its output, on the decoder or on the first layer. Where any of
them may, it keeps its gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules

from sloth_backend.findings import Edits
from sloth_backend.run import find_embedding
from sloth_kernels.adapters import autocast_dtype
from sloth_kernels.program import Program
from sloth_plugins.kernel_patching.modules import is_capture

HOST_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""Functions that only say ``output.requires_grad_(True)``, by their names in ``HOSTS``."""
HOSTS = ("transformers", "peft", "trl")
OURS = "sloth_plugins"
GLOBAL_HOOKS = modules._global_forward_hooks, modules._global_forward_pre_hooks
"""Those of all modules."""


class FirstInput:
    """Follows what a decoder embeds up to its first layer.

    Args:
        model: what has the embedding.
        decoder: what calls it, then the layer.
        embedding: of tokens.
        layer: the first that runs as a program; nothing comes of it where that is not the decoder's first.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, embedding: nn.Module, layer: nn.Module) -> None:
        self.model, self.decoder = weakref.ref(model), weakref.ref(decoder)
        self.embedding, self.layer = weakref.ref(embedding), weakref.ref(layer)
        self.inside = False
        """Whether the decoder's forward is running, and nobody else gets hold of what it embeds."""
        self.embedded: weakref.ref[torch.Tensor] | None = None
        """What the decoder's last forward has embedded."""

    @classmethod
    def of(cls, model: nn.Module, layer: nn.Module, edits: Edits) -> FirstInput | None:
        """For the first layer that runs as a program; None where the model does not tell what it is made of."""
        decoder, embedding = getattr(model, "get_decoder", lambda: None)(), find_embedding(model, "input")
        if not isinstance(decoder, nn.Module) or not isinstance(embedding, nn.Module):
            return None
        first = cls(model, decoder, embedding, layer)
        for handle in (
            decoder.register_forward_pre_hook(first.begin, with_kwargs=True),
            embedding.register_forward_hook(first.note),
            decoder.register_forward_hook(first.end),
        ):
            edits.on_undo(handle.remove)
        return first

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The decoder's forward begins: what was embedded before is somebody else's."""
        if module is self.decoder():  # a deep copy brings this method along
            is_plain = torch.is_grad_enabled() and len(args) < 2 and not _asks_for_hidden_states(module, kwargs)
            self.embedded, self.inside = None, is_plain and self._is_unseen()

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The embedding has run."""
        if self.inside and module is self.embedding() and isinstance(output, torch.Tensor):
            self.embedded = weakref.ref(output)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The decoder's forward is over: what is embedded now is somebody else's."""
        if module is self.decoder():
            self.inside = False

    def is_nobodys_wish(self, x: torch.Tensor, program: Program) -> bool:
        """Whether nobody wants the gradient of ``x``, which ``program`` is about to read."""
        embedded = self.embedded() if self.embedded is not None else None
        if x is not embedded or not (x.requires_grad and x.is_leaf):
            return False
        if x._backward_hooks or x._post_accumulate_grad_hooks:
            return False
        # Layers behind it may be checkpointed by the host: their input has to require a gradient as before.
        return bool(program.trained(autocast_dtype(x)))

    def _is_unseen(self) -> bool:
        """Whether the host alone will have the embedding's output require a gradient, and no one else will see it.

        Asked before the pass: hooks that take themselves away are still there.
        """
        model, decoder, embedding, layer = self.model(), self.decoder(), self.embedding(), self.layer()
        if model is None or decoder is None or embedding is None or layer is None:
            return False
        if any(GLOBAL_HOOKS) or any("forward" in vars(module) for module in (embedding, decoder)):
            return False
        if not any(_is_hosts(hook) for hook in embedding._forward_hooks.values()):
            return False
        tables = embedding._forward_hooks, decoder._forward_pre_hooks, layer._forward_pre_hooks, layer._forward_hooks
        # Hidden states, which transformers collects by hooks, were not asked for.
        if not all(
            _is_hosts(hook) or _is_ours(hook) or is_capture(hook) for table in tables for hook in table.values()
        ):
            return False
        # Wrapped since, it may be seen by hooks of its wrapper.
        is_frozen = not any(parameter.requires_grad for parameter in embedding.parameters())
        return is_frozen and find_embedding(model, "input") is embedding


def _asks_for_hidden_states(decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(getattr(decoder, "config", None), "output_hidden_states", False) if asked is None else asked)


def _is_hosts(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__name__", "") in HOST_HOOKS and _package(hook) in HOSTS


def _is_ours(hook: Callable[..., Any]) -> bool:
    return _package(hook) == OURS


def _package(hook: Callable[..., Any]) -> str:
    return (getattr(hook, "__module__", None) or "").partition(".")[0]
