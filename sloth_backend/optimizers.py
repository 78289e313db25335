"""What optimizers keep on the device for each parameter they train, by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EIGHT_BIT = 1.05
"""Bytes of one 8-bit state: an entry, and its share of a block's scale."""

FIXED_BYTES = {
    "adafactor": 0.0,
    "adalomo": 0.0,
    "lomo": 0.0,
    "sgd": 0.0,
    "adamw_8bit": 2 * EIGHT_BIT,
    "adamw_bnb_8bit": 2 * EIGHT_BIT,
    "adamw_torch_8bit": 2 * EIGHT_BIT,
    "adamw_torch_4bit": EIGHT_BIT,
    "ademamix": 12.0,
    "ademamix_8bit": 3 * EIGHT_BIT,
    "lion_8bit": EIGHT_BIT,
    "lion_32bit": 4.0,
    "rmsprop_bnb": 4.0,
    "rmsprop_bnb_32bit": 4.0,
    "rmsprop_bnb_8bit": EIGHT_BIT,
}
"""Optimizer -> bytes for each parameter. Adafactor's rows and columns are next to nothing."""

PAGED = "paged_"
"""Optimizers of this prefix keep their state in unified memory, which leaves the device when it is short."""

STATES = {"adagrad": 1, "rmsprop": 1, "schedule_free_sgd": 1}
"""Optimizer -> tensors of the parameter's own dtype and size; all that are not named here keep Adam's two."""
ADAM_STATES = 2


def state_bytes(optimizer: str, parameters: Iterable[torch.nn.Parameter]) -> float:
    """Bytes of optimizer state for each entry of ``parameters``, the mean over those that train.

    Args:
        optimizer: its name, as in ``TrainingArguments.optim``; an unknown one counts as AdamW.
        parameters: of the model; 4 bytes an entry are taken where none of them trains.
    """
    if optimizer.startswith(PAGED):
        return 0.0
    if optimizer in FIXED_BYTES:
        return FIXED_BYTES[optimizer]
    trained = [(p.numel(), p.itemsize) for p in parameters if p.requires_grad]
    count = sum(numel for numel, _ in trained)
    itemsize = sum(numel * size for numel, size in trained) / count if count else 4.0
    return STATES.get(optimizer, ADAM_STATES) * itemsize
