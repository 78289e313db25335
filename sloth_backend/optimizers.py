"""What optimizers keep on the device for each parameter they train, by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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

BNB_EIGHT_BIT, TORCHAO_EIGHT_BIT = "_8bit", "adamw_torch_8bit"
"""Names that end so are bitsandbytes', but for one; the Trainer has it keep the state of embeddings in 32 bits."""

STATES = {"adagrad": 1, "rmsprop": 1, "schedule_free_sgd": 1}
"""Optimizer -> tensors of the parameter's own dtype and size; all that are not named here keep Adam's two."""
ADAM_STATES = 2


def state_bytes(
    optimizer: str, parameters: Iterable[torch.nn.Parameter], embeddings: Iterable[torch.Tensor] = ()
) -> float:
    """Bytes of optimizer state for each entry of ``parameters``, the mean over those that train.

    Args:
        optimizer: its name, as in ``TrainingArguments.optim``; an unknown one counts as AdamW.
        parameters: of the model; where none of them trains, one in float32 is taken to.
        embeddings: those of ``parameters`` that are weights of an ``nn.Embedding``.
    """
    if optimizer.startswith(PAGED):
        return 0.0
    of_embeddings = {id(p) for p in embeddings}
    trained = [
        (p.numel(), _entry_bytes(optimizer, p.itemsize, id(p) in of_embeddings)) for p in parameters if p.requires_grad
    ]
    count = sum(numel for numel, _ in trained)
    return sum(numel * size for numel, size in trained) / count if count else _entry_bytes(optimizer, 4, False)


def trainer_state_bytes(trainer: Any) -> float:
    """The same for what a ``transformers.Trainer`` will train; an optimizer of another's making counts as AdamW."""
    from torch import nn

    own = trainer.optimizer is not None or getattr(trainer, "optimizer_cls_and_kwargs", None) is not None
    name = "" if own else str(getattr(trainer.args.optim, "value", trainer.args.optim))
    embeddings = [module.weight for module in trainer.model.modules() if isinstance(module, nn.Embedding)]
    return state_bytes(name, trainer.model.parameters(), embeddings)


def _entry_bytes(optimizer: str, itemsize: int, is_embedding: bool) -> float:
    fixed = FIXED_BYTES.get(optimizer)
    if fixed is None:
        return STATES.get(optimizer, ADAM_STATES) * itemsize
    if is_embedding and optimizer.endswith(BNB_EIGHT_BIT) and optimizer != TORCHAO_EIGHT_BIT:
        return 4.0 * round(fixed / EIGHT_BIT)
    return fixed
