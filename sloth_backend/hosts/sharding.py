"""How accelerate spreads a model over processes, and what of it cannot work with the backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.config import SlothConfig
    from sloth_backend.findings import Edits, Finding
    from sloth_backend.run import Run


def sharding_of(accelerator: Any) -> str | None:
    """``fsdp1``, ``fsdp2``, ``zero-0`` to ``zero-3``; None where every process holds the whole model."""
    kind = getattr(accelerator.distributed_type, "name", "")
    if kind == "DEEPSPEED":
        return f"zero-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP":
        return "fsdp2" if getattr(accelerator, "is_fsdp2", False) else "fsdp1"
    return None


def spread(run: Run, accelerator: Any) -> Run:
    """``run`` with how accelerate will shard its model, and where that will move it."""
    sharding = sharding_of(accelerator)
    if sharding != "fsdp2":
        return replace(run, sharding=sharding, gathers_as=None, moves_to=None)
    return replace(run, sharding=sharding, gathers_as=_gathers_as(accelerator), moves_to=accelerator.device)


def _gathers_as(accelerator: Any) -> Any:
    """What FSDP2 casts gathered parameters to; None where it leaves them theirs."""
    return getattr(accelerator.state.fsdp_plugin.mixed_precision_policy, "param_dtype", None)


def sharding_problems(accelerator: Any, config: SlothConfig, model: nn.Module | None) -> list[str]:
    """What the run would get wrong, or wait for without end."""
    sharding = sharding_of(accelerator)
    if sharding == "fsdp1" and config.kernels not in (False, ()):
        return [
            "FSDP version 1 flattens parameters, which kernels read one by one: set fsdp_version: 2 (version: 2 in "
            "fsdp_config), or kernels=False among the options of the backend."
        ]
    if sharding != "fsdp2" or model is None:
        return [*_unreached(accelerator, config)]
    return [*_mangled(accelerator, model)]


def _unreached(accelerator: Any, config: SlothConfig) -> Iterator[str]:
    """DeepSpeed makes the optimizer that its JSON names by itself: nobody can give it groups."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if config.embedding_learning_rate is None or "optimizer" not in (getattr(plugin, "deepspeed_config", None) or ()):
        return
    yield (
        "embedding_learning_rate has no effect on an optimizer that DeepSpeed makes: leave `optimizer` out of its "
        "JSON, so that the host makes the one that it names, or leave embedding_learning_rate out."
    )


def _mangled(accelerator: Any, model: nn.Module) -> Iterator[str]:
    """FSDP2 casts floating parameters to the dtype that it computes in, packed 4-bit weights among them."""
    computes = _gathers_as(accelerator)
    packed = {m.weight.dtype for m in model.modules() if type(m).__name__ == "Linear4bit"}
    for dtype in sorted(packed, key=str):
        if computes is not None and dtype.is_floating_point and dtype != computes:
            yield (
                f"the 4-bit weights are packed as {dtype}, which FSDP would cast to {computes} and so destroy: load "
                f"the model with bnb_4bit_quant_storage={computes}, or train without mixed precision."
            )


def take_over_checkpointing(accelerator: Any, findings: list[Finding], edits: Edits) -> None:
    """Leave FSDP's own checkpointing of layers out where all of them are programs, which decide what they keep."""
    from sloth_backend.findings import Finding as Found

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    layers = [finding for finding in findings if finding.capability == "layer_program"]
    if plugin is None or sharding_of(accelerator) != "fsdp2" or not plugin.activation_checkpointing or not layers:
        return
    if any(finding.action != "changed" for finding in layers):
        reason = "FSDP's activation_checkpointing runs every layer again in backward, those of the backend too"
        findings.append(Found("warned", "checkpointing", reason, "sharding", "accelerate"))
        return
    edits.set(plugin, "activation_checkpointing", False)
    reason = "FSDP's activation_checkpointing is left out: every layer is a program, which decides what it keeps"
    findings.append(Found("changed", "checkpointing", reason, "sharding", "accelerate"))
