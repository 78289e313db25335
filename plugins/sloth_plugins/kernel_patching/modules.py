"""What a call of a module runs: its class's own forward, or something that others have put there."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""A module's tables of hooks."""
CAPTURING, CAPTURE = "transformers.utils.output_capturing", "output_capturing_hook"
"""Module and name of the hooks by which transformers collects what a call is asked for (``output_attentions``): the
first such call leaves them with the model for good."""


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


def is_capture(hook: object) -> bool:
    """Whether ``hook`` does nothing but collect what transformers is asked for, in calls that ask."""
    return getattr(hook, "__name__", "") == CAPTURE and getattr(hook, "__module__", "") == CAPTURING


def captures() -> bool:
    """Whether the call that runs asks for anything that such hooks collect."""
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    # A transformers that keeps it elsewhere may be collecting.
    return collector is None or bool(collector.get())


def is_heard(tables: Sequence[Mapping[int, object]]) -> bool:
    """Whether a hook in one of these tables takes part in the call that runs."""
    if not any(tables):
        return False
    return captures() or not all(is_capture(hook) for table in filter(None, tables) for hook in table.values())


class Children:
    """The modules inside another as they are now; to see whether one was replaced since costs half a microsecond.

    Args:
        module: their outermost parent.
        closed: modules that are looked at from outside alone.
    """

    __slots__ = ("_known", "_tables")

    def __init__(self, module: nn.Module, closed: Collection[nn.Module] = ()) -> None:
        self._tables = [parent._modules for parent in _open(module, closed) if parent._modules]
        self._known = [dict(table) for table in self._tables]

    def were_replaced(self) -> bool:
        """Whether they are others now."""
        return self._tables != self._known  # in C; modules are equal to themselves alone


def _open(module: nn.Module, closed: Collection[nn.Module]) -> Iterator[nn.Module]:
    yield module
    for child in module._modules.values():
        if child is not None and child not in closed:
            yield from _open(child, closed)
