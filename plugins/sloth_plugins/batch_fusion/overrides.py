"""Methods of the loop that other libraries have written anew, and when they do nothing but hand on.

Each is told by its class and by the names that its code uses: a later version that does more uses others, and is not
taken for the known one. Options of the trainer's arguments switch on what it does beside handing on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sloth_plugins.batch_fusion.rows import IGNORED

KNOWN = ("transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.base_trainer")
"""Modules whose versions of the loop add the losses of micro-batches, each divided as the host divides it."""
COUNTS_TOKENS = "include_tkps"
"""Option of Axolotl with which ``compute_loss`` counts the tokens of what it is given, in ``state.tokens``."""


class Override(NamedTuple):
    """A method of another library.

    Attributes:
        uses: names of globals and attributes that the known versions use.
        options: of the trainer's arguments, with which it does more than hand on.
        models: beginnings of model types for which it adds inputs.
    """

    uses: frozenset[str]
    options: tuple[str, ...]
    models: tuple[str, ...] = ()


_COUNTING = (
    "args include_tkps training sum torch tensor numel device is_distributed distributed all_reduce ReduceOp SUM state "
    "tokens zeros detach cpu"
)
_INPUTS = "accelerator unwrap_model config sample_packing zeros_like orpo_alpha orpo_compute_loss"
OVERRIDES = {
    ("LayerOffloadingMixin", "training_step"): Override(
        frozenset(("_layer_offload_ctx", "training_step")), ("layer_offloading",)
    ),
    ("ActivationOffloadingMixin", "training_step"): Override(
        frozenset(("activation_offload_context", "training_step")), ("activation_offloading",)
    ),
    ("AxolotlTrainer", "compute_loss"): Override(
        frozenset(f"{_COUNTING} {_INPUTS} compute_loss".split()), ("orpo_alpha",), ("gemma4",)
    ),
}
"""Axolotl's, by class and method."""
BUILTINS = frozenset(("super", "getattr", "hasattr"))


def objections(trainer: Any, model: Any, name: str) -> Iterator[str]:
    """What the trainer's classes do in their method ``name`` that nobody knows, or that is not for passes."""
    for kind in type(trainer).__mro__:
        method = vars(kind).get(name)
        if method is None or kind.__module__ in KNOWN:
            continue
        override = OVERRIDES.get((kind.__name__, name)) if kind.__module__.startswith("axolotl.") else None
        names = frozenset(getattr(getattr(method, "__code__", None), "co_names", ("?",)))
        if override is None or not names <= override.uses | BUILTINS:
            yield f"{kind.__name__} has a {name} of its own"
            continue
        for option in override.options:
            if value := getattr(trainer.args, option, None):
                yield f"{kind.__name__}.{name} does more than the Trainer's with {option}={value!r}"
        if str(getattr(model.config, "model_type", "")).startswith(override.models or ("\0",)):
            yield f"{kind.__name__}.{name} adds inputs for models of the type {model.config.model_type!r}"


class HostCounts:
    """Tokens as the host counts those of its micro-batches, whatever passes."""

    def __init__(self, trainer: Any) -> None:
        counts = getattr(trainer.args, COUNTS_TOKENS, False)
        self.state = trainer.state if counts else None
        self.before: Mapping[str, Any] = dict(getattr(trainer.state, "tokens", ()))

    def settle(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take the counts of the passes since then back, and count ``batches`` instead."""
        if self.state is None:
            return
        labels: Sequence[torch.Tensor] = [batch["labels"] for batch in batches]
        counted = {
            "trainable": sum(int((label != IGNORED).sum()) for label in labels),
            "total": sum(label.numel() for label in labels),
        }
        self.state.tokens = {name: self.before.get(name, torch.zeros(1)) + count for name, count in counted.items()}
