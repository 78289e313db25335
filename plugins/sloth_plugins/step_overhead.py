"""Step overhead: what a host asks of the whole model in every micro-batch, answered without walking all of it.

The Trainer calls ``model.train()`` and ``model.num_parameters(exclude_embeddings=True)`` for each micro-batch, while
the device has nothing to do. Both visit every module in Python: 10 and 12 ms for the 2,665 modules of an 8B model under
LoRA. Here the modules and parameters are listed once. Each call holds the list against the model in a few passes that
run in C, a millisecond at most, and makes it anew when a module or parameter was added, removed or exchanged.

Not noticed, until something else changes: a ``train`` that is set on an inner module's instance or put on its class,
and an ``nn.Embedding`` turned into another kind of module by assignment to ``__class__``.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl

CAPABILITY = "step_overhead"
MIN_MODULES = 16
"""Smaller parts of a model are walked as fast as they are checked."""
WALKERS = ("train", "children", "named_children")
"""Methods of nn.Module that ``train`` consists of."""


@hookimpl
def sloth_patch_model(model: nn.Module, edits: Edits) -> list[Finding]:
    """Replace ``train`` of the largest parts that nn.Module's own serves, and ``num_parameters`` of the model."""
    parts = list(plain_parts("", model))
    findings = [_patch_train(name, part, edits) for name, part in parts]
    if not parts:
        reason = f"no part of {MIN_MODULES} modules or more leaves train() to nn.Module"
        findings.append(Finding("skipped", "train", reason, CAPABILITY))
    if hasattr(type(model), "num_parameters"):
        findings.append(_patch_count(model, edits))
    return findings


class Parts:
    """The modules at and below ``root``, as they were when this was made."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self._tables = [module._modules for module in self.modules]
        self._children, self._kinds = self._now()

    def stand(self) -> bool:
        """Whether they are still the same, of the same classes."""
        children, kinds = self._now()
        same = len(children) == len(self._children) and all(map(is_, children, self._children))
        return same and kinds == self._kinds

    def _now(self) -> tuple[list[nn.Module | None], set[type]]:
        return list(chain.from_iterable(map(dict.values, self._tables))), set(map(type, self.modules))


def plain_parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted name and root of the largest parts, at ``module`` or below, in which ``train`` is nn.Module's own."""
    modules = list(module.modules())
    if len(modules) < MIN_MODULES:
        return
    if all(map(_is_plain, modules)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from plain_parts(f"{name}.{child_name}".lstrip("."), child)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    own = all(getattr(kind, walker) is getattr(nn.Module, walker) for walker in WALKERS)
    return own and "training" in vars(module) and "train" not in vars(module)


def _patch_train(name: str, root: nn.Module, edits: Edits) -> Finding:
    edits.set(root, "train", types.MethodType(_listed_train(root), root))
    count = sum(1 for _ in root.modules())
    return Finding("changed", name or "model", f"train() looks at {count:,} modules without a call each", CAPABILITY)


def _listed_train(root: nn.Module) -> Callable[..., Any]:
    original, owner, parts = type(root).train, weakref.ref(root), Parts(root)
    states = list(map(vars, parts.modules))
    plain = True

    @functools.wraps(original)
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nonlocal parts, states, plain
        # A deep copy of the model brings this method along, but its modules are others.
        if self is not owner() or not isinstance(mode, bool):
            return original(self, mode)
        if not parts.stand():
            parts = Parts(self)
            states = list(map(vars, parts.modules))
            plain = all(_is_plain(module) for module in parts.modules if module is not self)
        if not plain:
            return original(self, mode)
        for module, state in zip(parts.modules, states, strict=True):
            if state["training"] is not mode:
                module.training = mode
        return self

    return train


def _patch_count(model: Any, edits: Edits) -> Finding:
    edits.set(model, "num_parameters", types.MethodType(_remembered_count(model), model))
    return Finding("changed", "num_parameters", "counted anew only when the parameters have changed", CAPABILITY)


def _remembered_count(model: Any) -> Callable[..., int]:
    """``num_parameters``, remembered for each argument.

    Counts of trained parameters alone are not remembered: ``requires_grad`` may be switched at any time.
    """
    original, owner, parts = type(model).num_parameters, weakref.ref(model), Parts(model)
    tables = [module._parameters for module in parts.modules]
    seen, counts = _fingerprint(tables), dict[bool, int]()

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        nonlocal parts, tables, seen
        if only_trainable or self is not owner():
            return original(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if not parts.stand():
            parts = Parts(self)
            tables = [module._parameters for module in parts.modules]
            counts.clear()
        if (now := _fingerprint(tables)) != seen:
            seen = now
            counts.clear()
        if exclude_embeddings not in counts:
            counts[exclude_embeddings] = original(self, exclude_embeddings=exclude_embeddings)
        return counts[exclude_embeddings]

    return num_parameters


def _fingerprint(tables: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Which parameters there are, and how many entries they have.

    By ``id``, so that a parameter that was dropped is not kept alive; another one at its address tells by its size.
    """
    parameters = [p for p in chain.from_iterable(map(dict.values, tables)) if p is not None]
    return list(map(id, parameters)), sum(map(Tensor.numel, parameters))
