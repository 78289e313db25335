"""What a call of a module runs: its class's own forward, or something that others have put there."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""A module's tables of hooks."""


def forward_of(module_name: str, class_name: str) -> Any:
    """A class's forward; a value that is no function where its module is not loaded or lacks the class."""
    return getattr(getattr(sys.modules.get(module_name), class_name, None), "forward", module_name)


def tampered(module: nn.Module) -> str | None:
    """What else takes part in a call of this module than its class's forward."""
    if hasattr(module, "_hf_hook"):
        return "is moved between devices by accelerate"
    if "forward" in vars(module):
        owner = getattr(vars(module)["forward"], "__module__", None) or "another library"
        return f"has a forward that is already replaced, by {owner}"
    return "has hooks" if any(getattr(module, table, None) for table in HOOKS) else None


def class_name(value: object) -> str:
    """Of the value's class."""
    return type(value).__name__
