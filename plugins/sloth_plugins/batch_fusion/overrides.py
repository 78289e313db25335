"""Methods of the loop that other libraries have written anew, and when they do nothing but hand on.

Each is told by its class and by the names that its code uses: a later version that does more uses others, and is not
taken for the known one. Options of the trainer's arguments switch on what it does beside handing on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sloth_plugins.batch_fusion.rows import IGNORED

KNOWN = ("transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.base_trainer")
"""Modules whose versions of the loop add the losses of micro-batches, each divided as the host divides it."""
COUNTS_TOKENS = "include_tkps"
"""Option of Axolotl with which ``compute_loss`` counts the tokens of what it is given, in ``state.tokens``."""
COUNTERS = {"trainable": "_tkps_trainable_acc", "total": "_tkps_total_acc"}
"""Where the trainer of Axolotl 0.21 counts them, and adds them to its state when it logs."""


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


def count_as_host(trainer: Any, batches: Sequence[torch.Tensor], passed: Sequence[torch.Tensor]) -> None:
    """Have the trainer count the labels of ``batches`` where it has counted those that ``passed``."""
    if not getattr(trainer.args, COUNTS_TOKENS, False):
        return
    wanted, counted = _counts(batches), _counts(passed)
    for name, counter in COUNTERS.items():
        more = wanted[name] - counted[name]
        if hasattr(trainer, counter):
            setattr(trainer, counter, getattr(trainer, counter) + more)
        else:
            trainer.state.tokens[name] = trainer.state.tokens[name] + more


def _counts(labels: Sequence[torch.Tensor]) -> dict[str, int]:
    return {"trainable": sum(int((t != IGNORED).sum()) for t in labels), "total": sum(t.numel() for t in labels)}
