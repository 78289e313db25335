"""Layers that run as programs decide themselves what they keep: the host's checkpointing function leaves them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sloth_backend.findings import Edits
from sloth_plugins.offloaded_checkpointing.seam import FUNCTION, SETTER, follow_setter


def directly(run_the_layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What a checkpointing function is called with, run once and not again."""
    return run_the_layer(*inputs, **options)


def leave_alone(model: nn.Module, layers: Sequence[nn.Module], edits: Edits) -> None:
    """Put ``directly`` in the place of the function that the host sets on ``layers``, now and whenever it sets it."""
    replaced: list[tuple[nn.Module, Any]] = []

    def put() -> None:
        for layer in layers:
            host = vars(layer).get(FUNCTION)
            if host is not None and host is not directly:
                replaced.append((layer, host))
                setattr(layer, FUNCTION, directly)

    def put_back() -> None:
        for layer, host in replaced:
            if vars(layer).get(FUNCTION) is directly:
                setattr(layer, FUNCTION, host)

    edits.on_undo(put_back)
    if hasattr(model, SETTER):
        follow_setter(model, put, edits)
    put()
