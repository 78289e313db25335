"""What parameters that are gathered for the layer that runs take of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sloth_plugins.layer_programs.head import GATHERED_ITEMSIZE, parameter_of
from sloth_plugins.layer_programs.layer import Layer

STREAMS_SHARE = 0.03
"""Of a device whose parameters are gathered by streams of their own: what is left for gaps between their buffers."""


def gathered_bytes(layers: Sequence[Layer]) -> int:
    """Of the layer that runs and the one that is gathered meanwhile, the gradients of the last one on their way."""
    linears = (layer.made.linears for layer in layers)
    return 3 * max(sum(p.nbytes for live in own for p in live.module.parameters()) for own in linears)


def streams_bytes(model: Any, layers: Sequence[Layer], budget: int) -> int:
    """What the streams that gather parameters hold and no other stream can take, of a device of ``budget``.

    The allocator keeps the memory of each stream apart: buffers of the outermost units and of layers stay with the one
    that gathered them, and where they come and go among other tensors, gaps stay.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings()) if model is not None else ()
    weights = {parameter_of(end) for end in ends if end is not None}
    outermost = GATHERED_ITEMSIZE * sum(weight.numel() for weight in weights)
    return int(STREAMS_SHARE * budget) + outermost + gathered_bytes(layers)
