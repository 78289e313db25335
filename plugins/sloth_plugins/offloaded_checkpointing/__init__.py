"""Offloaded checkpointing: the inputs of checkpointed layers wait for their backward in pinned host memory.

``arena`` and ``host_memory`` hold the memory, ``device`` is what is asked of CUDA, ``ring`` moves the tensors, ``seam``
is where transformers calls it. docs/offloaded-checkpointing.md tells the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sloth_backend.findings import Action, Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.plan import OFFLOAD, RECOMPUTE, MemoryPlan
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
from sloth_plugins.program_layers import runs_program

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.run import Run

__all__ = ["CAPABILITY", "host_bytes", "sloth_patch_model"]

CAPABILITY = "offloaded_checkpointing"
OUTCOMES: dict[str, tuple[Action, str]] = {
    OFFLOAD.name: ("changed", f"its input, where it has {MIN_BYTES >> 20} MiB or more, waits in pinned host memory"),
    RECOMPUTE.name: ("skipped", "its input stays on the device: backward needs it before a copy could be back"),
}
"""What becomes of a layer, by the name of its level, while the host checkpoints it."""
LEFT_ALONE: tuple[Action, str] = ("skipped", "the memory plan leaves it to the host")


@hookimpl
def sloth_patch_model(model: nn.Module, run: Run, plan: MemoryPlan | None, edits: Edits) -> list[Finding]:
    """Put the ring around the checkpointing function of each layer, as planned, or say why not.

    Layers that run as programs are not ours: they decide themselves what they keep.
    """
    layers = checkpointed_layers(model)
    ours = {name: layer for name, layer in layers.items() if not runs_program(layer)}
    obstacle = _obstacle(model, run, layers, ours) or _misfit(plan, len(layers))
    names = [] if obstacle else _level_names(plan, layers, ours, run.config.offload_keep_last)
    if OFFLOAD.name not in names:
        reason = obstacle or f"the memory plan offloads no layer: {_counted(names)}"
        return [Finding("skipped", "checkpointing", reason, CAPABILITY)]
    rings = Rings(make_ring)
    findings = _pinning(rings, run.device)
    Seam(model, dict(zip(ours.values(), names, strict=True)), rings).install(edits)
    for name, choice in zip(ours, names, strict=True):
        action, reason = OUTCOMES.get(choice, LEFT_ALONE)
        findings.append(Finding(action, name, reason, CAPABILITY))
    return findings


def make_ring(device: torch.device) -> Ring | None:
    """The ring of a CUDA device; None for any other device, whose tensors stay where they are."""
    if device.type != "cuda":
        return None
    cuda = CudaDevice(device)
    return Ring(cuda, HostMemory(cuda))


def _obstacle(model: nn.Module, run: Run, layers: Mapping[str, nn.Module], ours: Mapping[str, nn.Module]) -> str:
    """Why nothing can be offloaded, in one sentence; empty where it can. ``ours`` are the layers without programs."""
    if layers and not ours:
        return "every layer runs as a program, which itself decides what it keeps"
    if run.config.checkpointing != "offload":
        return f"checkpointing={run.config.checkpointing!r}: the host keeps the layers' inputs as it does"
    if not layers or not can_override(model):
        return "no layer of this model checkpoints the way transformers' layers do"
    if run.device is None or run.device.type != "cuda":
        return f"the model is on {run.device}; layer inputs are offloaded from CUDA devices only"
    if run.gradient_checkpointing is False and not any(getattr(layer, FLAG) for layer in ours.values()):
        return "the host does not checkpoint layers; gradient_checkpointing=True asks it to"
    return ""


def _misfit(plan: MemoryPlan | None, count: int) -> str:
    """Why another plugin's plan cannot be followed; empty where it can, or where there is none."""
    if plan is None or len(plan.levels) == count:
        return ""
    return f"the memory plan has {len(plan.levels)} layers, the model {count} that checkpoint"


def _level_names(
    plan: MemoryPlan | None, layers: Mapping[str, nn.Module], ours: Mapping[str, nn.Module], keep_last: int
) -> list[str]:
    """One level's name for each of ``ours``: the plan's, which speaks of all ``layers``, else our own choice.

    That is to offload every input but the last ones', which backward needs before a copy could be back.
    """
    if plan is not None:
        return [level.name for name, level in zip(layers, plan.levels, strict=True) if name in ours]
    kept = min(keep_last, len(ours))
    return [OFFLOAD.name] * (len(ours) - kept) + [RECOMPUTE.name] * kept


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


def _pinning(rings: Rings, device: torch.device | None) -> list[Finding]:
    """Pin a page for trial: better to learn now than in the first step that this machine does not allow it."""
    ring, page = rings.on(device) if device is not None else None, map_pages(1)
    if ring is None or page is None:
        return []
    try:
        ring.device.pin(page)
    except PinError as error:
        reason = f"cannot be pinned: {error}; copies to and from it stall the host, checkpointing='host' does without"
        return [Finding("warned", "host memory", reason, CAPABILITY)]
    ring.device.unpin(page)
    return []
