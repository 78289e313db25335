"""What Accelerate's configuration and arguments mean for a Run, and what its ``prepare`` does to a model."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sloth_backend.hosts.sharding import sharding_problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from sloth_backend.config import SlothConfig
    from sloth_backend.findings import Edits
    from sloth_backend.phases import Session

_ORIGINAL = "_original_forward"
"""Where Accelerate keeps the forward that it has put autocast around."""
_NAMES = {
    "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "ademamix8bit": "ademamix_8bit",
    "lion": "lion_32bit",
    "lion8bit": "lion_8bit",
    "rmsprop8bit": "rmsprop_bnb_8bit",
}
"""Class of an optimizer, in lower case -> what TrainingArguments calls it, where that is another name."""
_ONE_STATE = "adagrad"
"""One that keeps one tensor for each parameter."""
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""Kinds of distributed training under which Accelerate moves parameters to devices in a way of its own."""


def place(accelerator: Any, model: Any, placement: bool | None) -> None:
    """Move the model where Accelerate is about to move it, so that it is patched for the device that it trains on."""
    wanted = accelerator.device_placement if placement is None else placement
    quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    dispatched = accelerator.verify_device_map(model) or (quantized and getattr(model, "hf_device_map", None))
    if wanted and not dispatched and accelerator.distributed_type.name not in _SHARDED:
        model.to(accelerator.device)


def split_embeddings(session: Session, model: Any, given: Sequence[Any]) -> None:
    """Give the embeddings their learning rate in the optimizer among ``given``, and tell the schedules there of it.

    Raises:
        SlothConfigError: there is none that trains them.
    """
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sloth_backend import phases
    from sloth_backend.config import SlothConfigError
    from sloth_backend.embedding_rate import OPTION, embedding_parameters, rate_finding, split_groups, unwrapped

    rate = session.run.config.embedding_learning_rate
    if rate is None:
        return
    bare = [unwrapped(unwrapped(one), "scheduler") for one in given]
    optimizers = [one for one in bare if isinstance(one, Optimizer)]
    if len(optimizers) != 1:
        text = f"{OPTION} is set: prepare the model together with its one optimizer, {len(optimizers)} are there"
        raise SlothConfigError([text])
    schedules = [one for one in bare if isinstance(one, LRScheduler) and one.optimizer is optimizers[0]]
    parameters = embedding_parameters(phases.base_model(model))
    session.edits.on_undo(split_groups(optimizers[0], parameters, rate, schedules))
    session.findings.append(rate_finding(parameters, rate))


def problems(accelerator: Any, config: SlothConfig, model: Any = None) -> list[str]:
    """What of Accelerate's configuration cannot be combined with ``config``."""
    found = []
    compiler = str(getattr(accelerator.state.dynamo_plugin.backend, "value", "no")).lower()
    if model is not None and uncompiled(model) is not model:
        compiler = "torch.compile(model)"
    if config.kernels not in (False, ()) and compiler != "no":
        found.append(
            f"torch.compile (dynamo_backend={compiler}) cannot be combined with kernels={config.kernels!r}: it cannot "
            "trace the forwards that ours run in. Leave it off, or set kernels=False among the options of the backend."
        )
    if accelerator.mixed_precision == "fp8":
        found.append("mixed_precision='fp8' replaces linear layers after ours are in place: use 'bf16' or 'fp16'.")
    if accelerator.distributed_type.name == "MEGATRON_LM":
        found.append("Megatron-LM builds a model of its own: choose DDP, FSDP or DeepSpeed, or leave it off.")
    return found + sharding_problems(accelerator, config, model)


def uncompiled(model: Any) -> Any:
    """The model inside the wrapper that ``torch.compile`` makes."""
    return vars(model).get("_modules", {}).get("_orig_mod", model)


def optimizer_bytes(model: nn.Module, args: tuple[Any, ...]) -> float:
    """Bytes of state for each trained parameter in the optimizer among ``args`` that has the model's parameters."""
    import torch

    from sloth_backend.optimizers import state_bytes

    names = [_trainer_s_name(optimizer) for optimizer in optimizers_of(model, args)]
    name = names[-1] if names else ""
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return state_bytes(name, model.parameters(), embeddings)


def optimizers_of(model: nn.Module, args: Iterable[Any]) -> list[Any]:
    """Those among ``args`` that train a parameter of ``model``."""
    import torch

    trained = {id(p) for p in model.parameters() if p.requires_grad}
    optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
    return [o for o in optimizers if any(id(p) in trained for group in o.param_groups for p in group["params"])]


def _trainer_s_name(optimizer: Any) -> str:
    """What ``TrainingArguments.optim`` calls an optimizer of this class and options."""
    name = type(optimizer).__name__.lower()
    if name == "sgd" and any(group.get("momentum") for group in optimizer.param_groups):
        return _ONE_STATE
    return name.replace("paged", "paged_") if name.startswith("paged") else _NAMES.get(name, name)


def keep_autocast(accelerator: Any, model: nn.Module, edits: Edits) -> None:
    """Have Accelerate's autocast around the forward that is left when ours, which it was put around, is taken back."""
    if not accelerator.native_amp:
        return
    from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager

    autocast: Any = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    target = weakref.ref(model)

    def wrap_again() -> None:
        alive: Any = target()
        if alive is not None and _ORIGINAL in vars(alive):
            setattr(alive, _ORIGINAL, alive.forward)
            alive.forward = types.MethodType(convert_outputs_to_fp32(autocast(alive.forward.__func__)), alive)

    edits.on_undo(wrap_again)
