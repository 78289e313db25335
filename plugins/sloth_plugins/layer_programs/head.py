"""Ways to compute the loss: how many logits it holds at a time, and how the gradient of a trained head is summed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sloth_kernels.ops.linear_cross_entropy import LOGITS_BYTES, rows_per_chunk
from sloth_plugins.layer_programs.costs import BYTES


class LossTile(NamedTuple):
    """Bytes of logits that the loss may hold at a time, and whether a trained head's gradient is summed in bf16."""

    size: int
    rounded_sums: bool = False


LOSS_TILES = (LossTile(LOGITS_BYTES), LossTile(LOGITS_BYTES // 4), LossTile(LOGITS_BYTES // 8))
TRAINED_TILES = (*LOSS_TILES, LossTile(LOGITS_BYTES, True), LossTile(LOGITS_BYTES // 2, True))
"""Those of a trained head in bf16. Tiles are large where each rounds the gradient of the whole head."""
GATHERED_ITEMSIZE = 2
"""Bytes of an element of a gathered head: FSDP computes in 16 bits where it counts."""
ROUNDING_SECONDS = 1e-3
"""What an exact sum is worth: it is given up only where memory is short."""


def parameter_of(module: Any) -> Any:
    """The weight of a head or an embedding.

    Some of whose rows PEFT trains by themselves: those it was loaded with, as each look at ``weight`` makes a new one.
    """
    rows = getattr(module, "token_adapter", None)
    return module.weight if rows is None else rows.base_layer.weight


def _trains(head: Any) -> bool:
    """Whether the loss makes a gradient of the whole head: also where only some of its rows keep theirs."""
    return parameter_of(head).requires_grad or hasattr(head, "token_adapter")


def tiles_of(head: Any) -> tuple[LossTile, ...]:
    """What there is to choose from for ``head``, an ``nn.Linear`` or None."""
    trained = head is not None and _trains(head) and parameter_of(head).dtype == torch.bfloat16
    return TRAINED_TILES if trained else LOSS_TILES


def cost(head: Any, hidden_bytes: int, tokens: int, tile: LossTile) -> tuple[int, float]:
    """Bytes of the last norm's output, what is made of it, and a tile of logits; seconds that small tiles cost."""
    weight = None if head is None else parameter_of(head)
    if weight is None or weight.dim() != 2:
        return 4 * hidden_bytes, 0.0
    row = 2 * weight.shape[0]
    rows = min(tokens, rows_per_chunk(tokens, row, tile.size))
    held, several = rows * row, rows < tokens
    if _trains(head):
        # A sum over several tiles is in float32, and then rounded when the logits have gone.
        size, wide = weight.numel(), several and not tile.rounded_sums
        held = 4 * size + max(held, 2 * size) if wide else 2 * size + held
    if hasattr(head, "token_adapter"):
        held += weight.nbytes  # with its rows in their places
    if type(weight).__name__ == "DTensor":
        # A unit of its own that is yet to be gathered: whole, beside the buffer that it comes in.
        held += 2 * weight.numel() * GATHERED_ITEMSIZE
    # Each tile reads the whole head three times.
    seconds = 3 * weight.nbytes / BYTES * (tokens / rows - 1)
    return 4 * hidden_bytes + held, seconds + ROUNDING_SECONDS * (tile.rounded_sums and several)


def still_free(model: Any) -> tuple[int, int]:
    """Bytes of the gradients of the embedding, and of a head that is not tied to it, before backward has made them."""
    if model is None or (embedding := model.get_input_embeddings()) is None:
        return 0, 0
    head, own = model.get_output_embeddings(), parameter_of(embedding)
    weights = own, parameter_of(head) if head is not None and parameter_of(head) is not own else None
    first, second = (weight.nbytes if weight is not None and weight.requires_grad else 0 for weight in weights)
    return first, second


def waiting_bytes(model: Any) -> int:
    """Bytes of a trained head's gradient that wait through all of backward, where the head is tied to the embedding.

    Autograd adds the two up before it adds them to the gradient of earlier passes.
    """
    if model is None or (head := model.get_output_embeddings()) is None:
        return 0
    weight, embedded = parameter_of(head), parameter_of(model.get_input_embeddings())
    return weight.nbytes if weight is embedded and weight.requires_grad else 0
