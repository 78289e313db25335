"""A contender's model, as its users load it, on the GPU where there is one.

Unsloth is used through its public functions alone. ``first_imports`` must run before torch is imported: Unsloth asks
to come first.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration_tests.benchmarks.training.contenders import DRIVER_GIB, Contender
from integration_tests.benchmarks.training.workloads import Workload

if TYPE_CHECKING:
    import torch

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def first_imports(kind: str) -> None:
    """What has to be imported before everything else."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_DISABLED", "true")
    if kind == "unsloth":
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        importlib.import_module("unsloth")
        # Its gather table does not compile on Triton 3.6; its own fallback table does.
        nf4: Any = importlib.import_module("unsloth.kernels.nf4")
        nf4._HAS_TL_GATHER = False


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    import torch

    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def imitate_card(gib: float | None) -> None:
    """Let this process take no more memory than a card of ``gib`` would leave it; nothing without a GPU."""
    import torch

    if gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - DRIVER_GIB) * 2**30 / total))


def lora_config(rank: int) -> Any:
    """LoRA on all seven linears, no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM")


def base_model(contender: Contender, folder: Path) -> Any:
    """The checkpoint in bf16, its attention PyTorch's; in float32 for the truth."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if contender.truth else torch.bfloat16
    attention = frugal_attention() if contender.truth else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": str(device())}, attn_implementation=attention
    )
    if contender.truth:
        compute_in(model, dtype)
    return model


def frugal_attention() -> str:
    """The name of PyTorch's attention over keys that are repeated for their groups: in float32 it has no kernel for
    groups, and would write all scores down."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        causal = mask is None and q.shape[2] > 1
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=options.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("repeated", attend)
    AttentionMaskInterface.register("repeated", sdpa_mask)
    return "repeated"


def multiply_in_tf32(model: Any) -> None:
    """Multiply float32 in TF32, whose ten bits are eight times as fine as bf16's seven. Angles of rotary embeddings
    are left out: positions do not fit in ten bits."""
    import torch

    set_precision = torch.set_float32_matmul_precision
    set_precision("high")
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.register_forward_pre_hook(lambda *_: set_precision("highest"))
            module.register_forward_hook(lambda *_: set_precision("high"))


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let 4-bit linears multiply in ``dtype``, whatever the checkpoint says."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


def adapted_model(contender: Contender, workload: Workload, folder: Path) -> Any:
    """Stock's or Liger's model with its adapters, prepared as PEFT's documentation says for a 4-bit base."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = base_model(contender, folder)
    if contender.kind == "liger":
        importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model)
    if workload.training == "full":
        return model
    if workload.nf4:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, lora_config(workload.rank))


def unsloth_model(workload: Workload, folder: Path) -> Any:
    """Unsloth's model with its adapters."""
    fast = importlib.import_module("unsloth").FastLanguageModel
    longest = max(length for _, length in workload.points)
    whole = workload.training == "full"
    model, _ = fast.from_pretrained(
        str(folder), max_seq_length=longest, load_in_4bit=workload.nf4, full_finetuning=whole, dtype=None
    )
    if whole:
        return model
    return fast.get_peft_model(
        model,
        r=workload.rank,
        lora_alpha=workload.rank,
        lora_dropout=0,
        target_modules=list(LINEARS),
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )


def findings(contender: Contender, model: Any) -> dict[str, Any]:
    """What our backend reports of the run, one line a kind of finding; nothing for the others."""
    if not contender.ours:
        return {}
    from sloth_backend import report
    from sloth_backend.findings import summarize

    groups = summarize(report(model).findings)
    return {"findings": [f"{f.action} {f.capability}: {f.reason} ({count})" for f, count in groups]}
