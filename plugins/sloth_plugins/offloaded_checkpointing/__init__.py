"""Offloaded checkpointing: the inputs of checkpointed layers wait for their backward in pinned host memory.

``arena`` and ``host_memory`` hold the memory, ``device`` is what is asked of CUDA, ``ring`` moves the tensors, ``seam``
is where transformers calls it. docs/offloaded-checkpointing.md tells the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sloth_backend.findings import Action, Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.plan import LayerPlan, MemoryPlan
from sloth_plugins.offloaded_checkpointing.device import CudaDevice, PinError
from sloth_plugins.offloaded_checkpointing.host_memory import HostMemory, map_pages
from sloth_plugins.offloaded_checkpointing.ring import Ring
from sloth_plugins.offloaded_checkpointing.seam import (
    FLAG,
    MIN_BYTES,
    Rings,
    Seam,
    can_override,
    checkpointed_layers,
    host_bytes,
)

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.run import Run

__all__ = ["CAPABILITY", "host_bytes", "sloth_memory_plan", "sloth_patch_model"]

CAPABILITY = "offloaded_checkpointing"
OUTCOMES: dict[LayerPlan, tuple[Action, str]] = {
    "offload": ("changed", f"its input, where it has {MIN_BYTES >> 20} MiB or more, waits in pinned host memory"),
    "recompute": ("skipped", "its input stays on the device: backward needs it before a copy could be back"),
    "keep": ("skipped", "the memory plan leaves it to the host"),
}
"""What becomes of a layer, by its plan, while the host checkpoints it."""


@hookimpl
def sloth_memory_plan(model: nn.Module, run: Run) -> MemoryPlan | None:
    """Offload every layer's input but the last ones', which backward needs before a copy could be back."""
    if _obstacle(model, run):
        return None
    count = len(checkpointed_layers(model))
    kept = min(run.config.offload_keep_last, count)
    return MemoryPlan(("offload",) * (count - kept) + ("recompute",) * kept)


@hookimpl
def sloth_patch_model(model: nn.Module, run: Run, plan: MemoryPlan | None, edits: Edits) -> list[Finding]:
    """Put the ring around the checkpointing function of each layer, as planned, or say why not."""
    layers = checkpointed_layers(model)
    obstacle = _obstacle(model, run) or _misfit(plan, len(layers))
    if obstacle or plan is None or run.device is None:
        return [Finding("skipped", "checkpointing", obstacle or "no memory plan was made", CAPABILITY)]
    rings = Rings(make_ring)
    findings = _pinning(rings, run.device)
    Seam(model, dict(zip(layers.values(), plan.layers, strict=True)), rings).install(edits)
    for name, choice in zip(layers, plan.layers, strict=True):
        action, reason = OUTCOMES[choice]
        findings.append(Finding(action, name, reason, CAPABILITY))
    return findings


def make_ring(device: torch.device) -> Ring | None:
    """The ring of a CUDA device; None for any other device, whose tensors stay where they are."""
    if device.type != "cuda":
        return None
    cuda = CudaDevice(device)
    return Ring(cuda, HostMemory(cuda))


def _obstacle(model: nn.Module, run: Run) -> str:
    """Why nothing can be offloaded, in one sentence; empty where it can."""
    layers = checkpointed_layers(model)
    if run.config.checkpointing != "offload":
        return f"checkpointing={run.config.checkpointing!r}: the host keeps the layers' inputs as it does"
    if not layers or not can_override(model):
        return "no layer of this model checkpoints the way transformers' layers do"
    if run.device is None or run.device.type != "cuda":
        return f"the model is on {run.device}; layer inputs are offloaded from CUDA devices only"
    if run.gradient_checkpointing is False and not any(getattr(layer, FLAG) for layer in layers.values()):
        return "the host does not checkpoint layers; gradient_checkpointing=True asks it to"
    return ""


def _misfit(plan: MemoryPlan | None, count: int) -> str:
    """Why a plan, perhaps another plugin's, gives us nothing to do; empty where it does."""
    if plan is None:
        return "no memory plan was made"
    if len(plan.layers) != count:
        return f"the memory plan has {len(plan.layers)} layers, the model {count} that checkpoint"
    if "offload" not in plan.layers:
        return f"the memory plan offloads no layer: {plan}"
    return ""


def _pinning(rings: Rings, device: torch.device) -> list[Finding]:
    """Pin a page for trial: better to learn now than in the first step that this machine does not allow it."""
    ring, page = rings.on(device), map_pages(1)
    if ring is None or page is None:
        return []
    try:
        ring.device.pin(page)
    except PinError as error:
        reason = f"cannot be pinned: {error}; copies to and from it stall the host, checkpointing='host' does without"
        return [Finding("warned", "host memory", reason, CAPABILITY)]
    ring.device.unpin(page)
    return []
