"""Determinism: two runs of one seed on one machine give the same numbers to the bit, where the user asks for it.

Some backward kernels add up in whatever order their blocks finish. torch has one switch for all of them, which the
attention op asks too when it chooses a kernel; it holds for the whole process.
"""

from __future__ import annotations

from typing import Any

import torch

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.run import Run

CAPABILITY = "deterministic"


@hookimpl
def sloth_patch_model(run: Run, edits: Edits) -> list[Finding]:
    """Turn torch's switch on until the model is as it was before."""
    if not run.config.deterministic:
        return []
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory

    def restore() -> None:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = fills

    edits.on_undo(restore)
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warns)
    # Memory that is taken is written before it is read; filling it first would only cost time.
    memory.fill_uninitialized_memory = False
    reason = "torch.use_deterministic_algorithms is on for this process"
    return [Finding("changed", "torch", reason, CAPABILITY)]
