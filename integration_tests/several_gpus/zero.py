"""DeepSpeed's ZeRO for ``cases``, on GPUs and on CPUs over gloo: how it is set up, and how its parameters are read."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import save_file
from torch import nn

# Of a tiny model DeepSpeed would keep everything gathered, and ZeRO-3 would shard nothing.
SHARD_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def stage_of(strategy: str) -> int:
    """The number in ``zero-1`` to ``zero-3``; 0 for what is not DeepSpeed's."""
    found = re.fullmatch(r"zero-([123])", strategy)
    return int(found[1]) if found else 0


def prepare(device: str) -> None:
    """Have accelerate count the processes, which on CPUs it does not under DeepSpeed; compile no operators."""
    os.environ |= {"DS_ACCELERATOR": device, "ACCELERATE_USE_DEEPSPEED": "true"}
    if device == "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        PartialState._prepare_backend = _gloo_for_deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)


_prepare_backend: Any = PartialState._prepare_backend


def _gloo_for_deepspeed(
    self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str, DistributedType]:
    return _prepare_backend(self, cpu, sagemaker_dp, backend) if cpu else ("gloo", DistributedType.MULTI_GPU)


def options_of(stage: int, **batches: Any) -> dict[str, Any]:
    """DeepSpeed's JSON, with the keys about batches as the host is to read them."""
    return {
        "zero_optimization": {"stage": stage, **(SHARD_ALL if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        **batches,
    }


def trainer_options(stage: int) -> dict[str, Any]:
    """For ``TrainingArguments.deepspeed``."""
    return options_of(stage, train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto")


def plugin(stage: int, accumulation: int) -> DeepSpeedPlugin:
    """For a loop with batches of two rows."""
    batches = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation}
    return DeepSpeedPlugin(hf_ds_config=options_of(stage, **batches))


def loaded(model: Any) -> Any:
    """The model as transformers loads it, from a folder of each process: sharded where ZeRO-3 is on by then."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        # Under DeepSpeed save_pretrained writes in the first process alone.
        save_file(model.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return type(model).from_pretrained(folder)


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter, gathered where ZeRO-3 has spread it over the processes, all of which have to ask."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
