"""Why the micro-batches of a trainer cannot be passed together. Nothing here is about one batch: see ``rows``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sloth_backend.run import Run
from sloth_plugins.batch_fusion.documents import drops, kept_apart
from sloth_plugins.batch_fusion.fusion import LOOP
from sloth_plugins.batch_fusion.next_tokens import other_labels
from sloth_plugins.batch_fusion.overrides import COUNTS_TOKENS, objections
from sloth_plugins.kernel_patching.loss import calls_loss_function

ADDITIVE_LOSSES = ("nll", "chunked_nll")
PARALLEL = ("NO", "MULTI_GPU", "MULTI_CPU")
"""accelerate's kinds of runs, beside FSDP2, in which gradients wait for the pass that is told to synchronise."""


def obstacle(trainer: Any, model: Any, run: Run) -> str | None:
    """The first reason to leave the trainer's micro-batches as they are; None where there is none."""
    return next(_obstacles(trainer, model, run), None)


def _obstacles(trainer: Any, model: Any, run: Run) -> Iterator[str]:
    if run.config.accumulation == "host":
        yield "accumulation='host'"
    if (reason := other_labels(model)) is not None:
        yield f"labels may not be next tokens: {reason}"
    if not kept_apart(model):
        yield "rows laid end to end would not be kept apart"
    for name in LOOP:
        yield from objections(trainer, model, name)
        if name in vars(trainer):
            yield f"somebody else has replaced the trainer's {name}"
    yield from _packing(trainer.args)
    yield from _losses(trainer, model)
    yield from _randomness(trainer, model, run)
    kind = trainer.accelerator.distributed_type
    sharded = getattr(trainer.accelerator, "is_fsdp2", False)
    if (str(getattr(kind, "value", kind)) not in PARALLEL and not sharded) or trainer.args.n_gpu > 1:
        yield f"the run is spread as {kind}, which counts the passes of a step itself"
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        yield "rows are spread over several processes"
    if trainer.args.world_size > 1 and getattr(trainer.args, COUNTS_TOKENS, False):
        yield f"{COUNTS_TOKENS} has all processes add their counts at each pass"


def _packing(args: Any) -> Iterator[str]:
    """Axolotl drops the mask of packed rows where ``attn_implementation`` says what reads positions instead."""
    if getattr(args, "sample_packing", False) and not getattr(args, "sample_packing_drop_attention_mask", False):
        yield (
            "sample_packing gives rows an attention_mask, with which transformers lets the documents of a row see each "
            "other; with `attn_implementation: sdpa` they are kept apart, and pass together"
        )


def _losses(trainer: Any, model: Any) -> Iterator[str]:
    """Losses that are not the sum of what each token costs."""
    args = trainer.args
    if not trainer.model_accepts_loss_kwargs and not calls_loss_function(vars(model).get("forward", model.forward)):
        yield "each micro-batch counts as its mean, but the model's forward was replaced and may make another loss"
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func may not be additive"
    if getattr(trainer, "label_smoother", None) is not None:
        yield "label smoothing takes means of its own"
    if getattr(args, "loss_type", None) not in (None, *ADDITIVE_LOSSES):
        yield f"loss_type={args.loss_type!r} is not the sum of what each token costs"
    if getattr(trainer, "aux_loss_enabled", False) or getattr(model.config, "output_router_logits", False):
        yield "the auxiliary loss of routers is not additive"
    if any(getattr(peft, "is_prompt_learning", False) for peft in getattr(trainer.model, "peft_config", {}).values()):
        yield "prompt tokens are put before each row"


def _randomness(trainer: Any, model: Any, run: Run) -> Iterator[str]:
    """Random numbers that would be drawn for other shapes than the host draws them for."""
    if getattr(trainer.args, "neftune_noise_alpha", None):
        yield "NEFTune's noise depends on the length of the padded row"
    if run.config.accumulation == "auto" and drops(model):
        yield "dropout would draw other numbers than the host's; accumulation='fused' passes them together all the same"
