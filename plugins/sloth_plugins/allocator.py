"""Allocator: memory of a CUDA device in segments that grow, so that passes of other shapes find room where a plan says.

PyTorch's allocator asks the driver for blocks and keeps them. Passes of several shapes leave blocks that fit nothing
later on; near the limit it gives all of them back and asks again, in every step, or finds no room at all. A segment
that grows by pages has no such gaps. The setting holds for the whole process, for memory taken from now on.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.run import Run

CAPABILITY = "allocator"
SETTING = "expandable_segments"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
C: Any = torch._C


@hookimpl
def sloth_patch_model(run: Run, edits: Edits) -> list[Finding]:
    """Turn the setting on until the model is as it was before, unless the user has said how it should be."""
    if run.device is None or run.device.type != "cuda":
        return []
    if reason := _obstacle():
        return [Finding("skipped", SETTING, reason, CAPABILITY)]
    current = _current()
    if f"{SETTING}:True" in current:
        return []
    edits.on_undo(lambda: C._accelerator_setAllocatorSettings(_joined(current, f"{SETTING}:False")))
    C._accelerator_setAllocatorSettings(_joined(current, f"{SETTING}:True"))
    return [Finding("changed", SETTING, "device memory grows by pages, for this process", CAPABILITY)]


def _obstacle() -> str | None:
    for name in VARIABLES:
        if any(word in os.environ.get(name, "") for word in (SETTING, "backend")):
            return f"{name}={os.environ[name]} says how memory is taken"
    if not hasattr(C, "_accelerator_setAllocatorSettings") or torch.version.hip is not None:
        return "this PyTorch has no such setting that can be changed while it runs"
    return None


def _current() -> str:
    """The settings in force; PyTorch 2.11 tells only those that the process was started with."""
    if hasattr(C, "_accelerator_getAllocatorSettings"):
        return C._accelerator_getAllocatorSettings()
    return next(filter(None, (os.environ.get(name) for name in VARIABLES)), "")


def _joined(current: str, setting: str) -> str:
    """All settings: those that are left out return to their defaults."""
    others = [part for part in current.split(",") if part and not part.strip().startswith(SETTING)]
    return ",".join([*others, setting])
