"""Methods of the loop that other libraries have written anew, and when they do nothing but hand on.

Each is told by its class and by the names that its code uses: a later version that does more uses others, and is not
taken for the known one. Options of the trainer's arguments switch on what it does beside handing on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

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
    "tokens zeros detach cpu _accumulate_token_counts"
)
_INPUTS = (
    "accelerator unwrap_model config sample_packing zeros_like orpo_alpha orpo_compute_loss _model_type "
    "_maybe_inject_mm_token_type_ids"
)
_SPREAD = "accelerator _deepspeed_sequence_parallel_group parallelism_config sp_size"
"""Rows over several processes, which are another obstacle."""
OVERRIDES = {
    ("LayerOffloadingMixin", "training_step"): Override(
        frozenset(("_layer_offload_ctx", "training_step")), ("layer_offloading",)
    ),
    ("ActivationOffloadingMixin", "training_step"): Override(
        frozenset(
            ("activation_offload_context", "training_step", "model", "_install_live_fsdp_parameter_storage_hooks")
        ),
        ("activation_offloading",),
    ),
    ("AxolotlTrainer", "training_step"): Override(frozenset(f"{_SPREAD} training_step torch is_tensor".split()), ()),
    ("AxolotlTrainer", "compute_loss"): Override(
        frozenset(f"{_COUNTING} {_INPUTS} {_SPREAD} compute_loss".split()), ("orpo_alpha",), ("gemma4",)
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
    """Tokens as the host counts those of its micro-batches, whatever passes.

    In Axolotl 0.21 ``COUNTERS`` of the trainer hold them, and are added to its state when it logs.
    """

    COUNTERS: ClassVar = {"trainable": "_tkps_trainable_acc", "total": "_tkps_total_acc"}

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer if getattr(trainer.args, COUNTS_TOKENS, False) else None

    def settle(self, batches: Iterable[torch.Tensor], passed: Iterable[torch.Tensor]) -> None:
        """Count the labels of ``batches`` instead of those that ``passed``."""
        if self.trainer is None:
            return
        wanted, counted = _counts(batches), _counts(passed)
        for name, counter in self.COUNTERS.items():
            more = wanted[name] - counted[name]
            if hasattr(self.trainer, counter):
                setattr(self.trainer, counter, getattr(self.trainer, counter) + more)
            else:
                self.trainer.state.tokens[name] = self.trainer.state.tokens[name] + more


def _counts(labels: Iterable[torch.Tensor]) -> dict[str, int]:
    own = list(labels)
    return {"trainable": sum(int((t != IGNORED).sum()) for t in own), "total": sum(t.numel() for t in own)}
