"""Step overhead: what a host asks of the whole model in every step, answered without walking all of it.

The Trainer calls ``model.train()`` and ``model.num_parameters(exclude_embeddings=True)`` for each micro-batch, and
``model.zero_grad()`` and ``model.parameters()`` for each step of the optimizer, while the device has nothing to do. All
visit every module in Python: 5 to 12 ms each for the 2,665 modules of an 8B model under LoRA. Here the modules are
listed once. Each call holds the list against the model in a few passes that run in C, a quarter of a millisecond or so,
and makes it anew when a module was added, removed or exchanged; parameters are read from the modules every time.

Not noticed, until something else changes: a ``train`` or ``named_modules`` that is set on an inner module's instance or
put on its class, another dictionary put in the place of a module's ``_modules`` or ``_parameters``, and a module that
says that it equals the one whose place it took. A walk over ``named_modules`` that is under way does not notice what
its caller changes inside the list of layers that it is in, nor one over ``parameters`` what is changed after its first.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl

CAPABILITY = "step_overhead"
MIN_MODULES = 16
"""Smaller parts of a model are walked as fast as they are checked."""
WALKERS = ("train", "children", "named_children")
"""Methods of nn.Module that ``train`` consists of."""
WALK = ("named_modules",)
"""The one by which modules, parameters and buffers are found."""
READERS = ("parameters", "named_parameters", "_named_members", "named_modules")
"""Methods of the outermost module that ``parameters`` consists of; of the others it calls ``named_modules`` alone."""
LISTED = "_sloth_listed"
"""Mark of our own methods that find the same as nn.Module's."""
TRAINING, VALUES = itemgetter("training"), methodcaller("values")


@hookimpl
def sloth_patch_model(model: nn.Module, edits: Edits) -> list[Finding]:
    """Replace ``train`` and ``named_modules`` of parts that nn.Module's own serve, and the model's ``num_parameters``.

    ``named_modules`` is replaced in lists of layers alone: who only wants a model's first parameter never gets to one.
    """
    parts = list(plain_parts("", model, WALKERS))
    findings = [_patch_train(name, part, edits) for name, part in parts]
    findings += [_patch_walk(name, part, edits) for name, part in plain_parts("", model, WALK, nn.ModuleList)]
    if not parts:
        reason = f"no part of {MIN_MODULES} modules or more leaves train() to nn.Module"
        findings.append(Finding("skipped", "train", reason, CAPABILITY))
    if hasattr(type(model), "num_parameters"):
        findings.append(_patch_count(model, edits))
    return findings


@hookimpl
def sloth_patch_trainer(trainer: Any, edits: Edits) -> list[Finding]:
    """Replace ``parameters`` of the trainer's model, adapters and all, where nn.Module's own serves.

    For each step the host asks for them twice: to clip gradients, and within ``zero_grad`` to drop them.
    """
    if trainer.args.n_gpu > 1:
        reason = "nn.DataParallel copies the model's methods to replicas, which have no parameters of their own"
        return [Finding("skipped", "parameters", reason, CAPABILITY)]
    return [_patch_parameters(trainer.model, edits)]


class Parts:
    """The modules at and below ``root``, as they were when this was made."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(_below(root))
        self._empty, self._tables = _by_use([module._modules for module in self.modules])
        self._copies, self._ordered = list(map(dict, self._tables)), list(filter(_is_ambiguous, self._tables))
        self._names, self._children, self._kinds = self._names_now(), self._children_now(), self._kinds_now()
        # Modules are compared in C; one that is equal to others than itself would pass for another.
        self._comparable = all(kind.__eq__ is object.__eq__ for kind in set(self._kinds))

    def stand(self) -> bool:
        """Whether they are still the same, of the same classes, by the same names, in the same order."""
        return (
            self._comparable
            and not any(self._empty)
            and self._tables == self._copies
            and self._children_now() == self._children
            and self._kinds_now() == self._kinds
            and self._names_now() == self._names
        )

    def _children_now(self) -> list[nn.Module | None]:
        # A dictionary with strings for keys refers to its values alone, in their order: no view of each is made.
        return gc.get_referents(*self._tables)

    def _kinds_now(self) -> list[type]:
        return list(map(type, self.modules))

    def _names_now(self) -> list[str]:
        return list(chain.from_iterable(self._ordered))


def _by_use(tables: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those without an entry, most of them, and the others."""
    return [table for table in tables if not table], [table for table in tables if table]


def _is_ambiguous(table: dict[str, nn.Module | None]) -> bool:
    """Whether its content and the order of its children do not tell the order of its names."""
    return type(table) is not dict or len(set(map(id, table.values()))) < len(table)


def _below(root: nn.Module) -> dict[nn.Module, None]:
    """``root`` and every module below it, whatever their own methods say of that; in nn.Module's order."""
    found, waiting = dict[nn.Module, None](), [root]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def plain_parts(
    name: str, module: nn.Module, methods: tuple[str, ...], kind: type[nn.Module] = nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """Dotted name and root of the largest parts of a ``kind`` in which ``methods`` are nn.Module's own.

    They are looked for at ``module``, whose name is ``name``, and below.
    """
    modules = _below(module)
    if len(modules) < MIN_MODULES:
        return
    if isinstance(module, kind) and all(_is_plain(part, methods) for part in modules):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from plain_parts(f"{name}.{child_name}".lstrip("."), child, methods, kind)


def _is_plain(module: nn.Module, methods: tuple[str, ...] = WALKERS) -> bool:
    kind, own = type(module), vars(module)
    inherited = all(getattr(kind, method) is getattr(nn.Module, method) for method in methods)
    return inherited and "training" in own and own.keys().isdisjoint(methods)


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
        if not all(map(is_, map(TRAINING, states), repeat(mode))):
            for module in parts.modules:
                module.training = mode
        return self

    return train


def _patch_walk(name: str, root: nn.Module, edits: Edits) -> Finding:
    edits.set(root, "named_modules", types.MethodType(_listed_walk(root), root))
    count = sum(1 for _ in root.modules())
    return Finding("changed", name or "model", f"named_modules() lists {count:,} modules without a walk", CAPABILITY)


def _listed_walk(root: nn.Module) -> Callable[..., Iterator[tuple[str, nn.Module]]]:
    original, owner = type(root).named_modules, weakref.ref(root)
    listed = Listed(root)

    @functools.wraps(original)
    def named_modules(
        self: nn.Module, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        nonlocal listed
        # A deep copy of the model brings this method along, but its modules are others.
        mine = remove_duplicate and self is owner()
        if mine and not listed.parts.stand():
            listed = Listed(self)
        # Below a module that the memo has already, the walk passes by those that it does not have.
        if not mine or not listed.plain or not (memo is None or memo.isdisjoint(listed.members)):
            yield from original(self, memo, prefix, remove_duplicate)
            return
        if memo is not None:
            memo |= listed.members
        yield from listed.under(prefix)

    setattr(named_modules, LISTED, True)
    return named_modules


class Listed:
    """``root.named_modules()``, as it was when this was made."""

    def __init__(self, root: nn.Module) -> None:
        names, modules = zip(*nn.Module.named_modules(root), strict=True)
        self.parts, self.members = Parts(root), set(modules)
        self.plain = all(_is_plain(module, WALK) for module in self.parts.modules if module is not root)
        self._names, self._prefix, self._found = names, "", list(zip(names, modules, strict=True))

    def under(self, prefix: str) -> list[tuple[str, nn.Module]]:
        """Names and modules, ``prefix`` before the names."""
        if prefix != self._prefix:
            full = [prefix, *map(f"{prefix}.".__add__, self._names[1:])] if prefix else self._names
            self._prefix, self._found = prefix, list(zip(full, (module for _, module in self._found), strict=True))
        return self._found


def _patch_parameters(model: nn.Module, edits: Edits) -> Finding:
    reason = _unlisted(model)
    if reason is not None:
        return Finding("skipped", "parameters", reason, CAPABILITY)
    edits.set(model, "parameters", types.MethodType(_listed_parameters(model), model))
    return Finding("changed", "parameters", "parameters() reads the modules' own tables without a walk", CAPABILITY)


def _unlisted(model: nn.Module) -> str | None:
    """Why the parameters of ``model`` have to be walked; None if the tables of its modules tell them."""
    modules = _below(model)
    if len(modules) < MIN_MODULES:
        return f"a model of fewer than {MIN_MODULES} modules is walked as fast as it is checked"
    if not all(_is_own(model, method) for method in READERS):
        return f"{type(model).__name__} finds parameters in its own way"
    others = sorted({type(module).__name__ for module in modules if not _is_own(module, "named_modules")})
    return f"{', '.join(others)} list modules in their own way" if others else None


def _is_own(module: nn.Module, method: str) -> bool:
    """Whether ``method`` is nn.Module's own, or ours that gives the same."""
    if getattr(type(module), method) is not getattr(nn.Module, method):
        return False
    return method not in vars(module) or hasattr(vars(module)[method], LISTED)


def _listed_parameters(model: nn.Module) -> Callable[..., Iterator[nn.Parameter]]:
    original, owner = type(model).parameters, weakref.ref(model)
    tables, plain = Tables(model), True

    @functools.wraps(original)
    def parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
        nonlocal tables, plain
        walk = original(self, recurse)
        # Who wants the first alone gets it without a look at the others.
        if (first := next(walk, None)) is not None:
            yield first
        # A deep copy of the model brings this method along, but its modules are others.
        if not recurse or self is not owner():
            yield from walk
            return
        if not tables.stand():
            tables, plain = Tables(self), _unlisted(self) is None
        if not plain:
            yield from walk
            return
        yield from [p for p in tables.parameters() if p is not first]

    setattr(parameters, LISTED, True)
    return parameters


class Tables:
    """Where the modules at and below ``root`` keep their parameters, in nn.Module's order."""

    def __init__(self, root: nn.Module) -> None:
        self._parts = Parts(root)
        self._empty, self._tables = _by_use([module._parameters for module in self._parts.modules])

    def stand(self) -> bool:
        """Whether they are still all that have parameters."""
        return not any(self._empty) and self._parts.stand()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those that are there now, each once."""
        found = list(chain.from_iterable(map(VALUES, self._tables)))
        # By id: torch computes the hash of a tensor in Python.
        unique = dict(zip(map(id, found), found, strict=True))
        unique.pop(id(None), None)
        return unique.values()

    def fingerprint(self) -> tuple[list[int], int]:
        """Which parameters there are, by place, and how many entries they have.

        By ``id``, so that one that was dropped is not kept alive; another one at its address tells by its size.
        """
        found = gc.get_referents(*self._tables)
        parameters = [p for p in found if p is not None]
        # Quantised weights are subclasses that torch would ask, in Python, what it should say of each of them.
        with torch._C.DisableTorchFunctionSubclass():
            return list(map(id, found)), sum(map(Tensor.numel, parameters))


def _patch_count(model: Any, edits: Edits) -> Finding:
    edits.set(model, "num_parameters", types.MethodType(_remembered_count(model), model))
    return Finding("changed", "num_parameters", "counted anew only when the parameters have changed", CAPABILITY)


def _remembered_count(model: Any) -> Callable[..., int]:
    """``num_parameters``, remembered for each argument.

    Counts of trained parameters alone are not remembered: ``requires_grad`` may be switched at any time.
    """
    original, owner, tables = type(model).num_parameters, weakref.ref(model), Tables(model)
    seen, counts = tables.fingerprint(), dict[bool, int]()

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        nonlocal tables, seen
        if only_trainable or self is not owner():
            return original(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if not tables.stand():
            tables = Tables(self)
            counts.clear()
        if (now := tables.fingerprint()) != seen:
            seen = now
            counts.clear()
        if exclude_embeddings not in counts:
            counts[exclude_embeddings] = original(self, exclude_embeddings=exclude_embeddings)
        return counts[exclude_embeddings]

    return num_parameters
