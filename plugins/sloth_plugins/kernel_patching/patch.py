"""Put an op in place of what a matched module computes, on that instance alone."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.roles import Role
from sloth_backend.run import Run
from sloth_kernels.op import Op
from sloth_plugins.kernel_patching.match import Matcher, global_function, inputs_of


def patch_modules(model: nn.Module, run: Run, ops: Mapping[str, Op], roles: list[Role], edits: Edits) -> list[Finding]:
    """Match every module of ``model`` against ``roles`` and patch those that match; one Finding a candidate."""
    matcher = Matcher(run.dtype or torch.get_default_dtype())
    findings = []
    for name, module in model.named_modules():
        for role in roles:
            finding = _patch_module(name, module, role, ops.get(role.op), run, matcher, edits)
            if finding is not None:
                findings.append(finding)
    return findings


def _patch_module(
    name: str, module: nn.Module, role: Role, op: Op | None, run: Run, matcher: Matcher, edits: Edits
) -> Finding | None:
    """Patch one module for one role; None where it does not resemble the role."""
    if op is None or not run.config.allows(role.op):
        return None
    match = matcher.match(module, role, op)
    if match is None:
        return None
    if match.variant is None:
        return Finding("skipped", name, match.reason, capability=role.name)
    if "forward" in vars(module) and not role.global_functions:
        owner = getattr(vars(module)["forward"], "__module__", None) or "another library"
        return Finding("skipped", name, f"its forward is already replaced, by {owner}", capability=role.name)
    forward = _global_forward if role.global_functions else _role_forward
    edits.set(module, "forward", types.MethodType(forward(module, role, op, match.variant), module))
    return Finding("changed", name, f"{op.name} kernel, variant {match.variant}", capability=role.name)


def _role_forward(module: nn.Module, role: Role, op: Op, variant: str) -> Callable[..., Any]:
    """The role's generic forward over ``op``; calls it cannot take go to the module's own forward."""
    return _cached_role_forward(type(module).forward, role.forward, op.fn, variant)


@functools.cache
def _cached_role_forward(
    original: Callable[..., Any], generic: Callable[..., Any], fn: Callable[..., Any], variant: str
) -> Callable[..., Any]:
    arity = inputs_of(generic)

    @functools.wraps(original)
    def forward(self: nn.Module, *inputs: Any, **extra: Any) -> Any:
        if extra or len(inputs) != arity:
            return original(self, *inputs, **extra)
        return generic(self, fn, variant, *inputs)

    return forward


def _global_forward(module: nn.Module, role: Role, op: Op, variant: str) -> Callable[..., Any]:
    """The module's own forward, unchanged, seeing the op in place of the role's function among its globals."""
    name = global_function(module, role)
    return _rebound(type(module).forward, str(name), role.forward, op.fn, variant)


@functools.cache
def _rebound(
    forward: types.FunctionType, name: str, generic: Callable[..., Any], fn: Callable[..., Any], variant: str
) -> types.FunctionType:
    """A twin of ``forward`` (same code, same closure) whose globals hold our function under ``name``.

    All layers of a class share one twin, so the interpreter's inline caches stay warm. The globals are a copy:
    nothing else in the module's namespace is seen to change, by this model or by others.
    """
    own = forward.__globals__[name]

    @functools.wraps(own)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and kwargs.keys() <= {"unsqueeze_dim"}:
            return generic(None, fn, variant, *args, **kwargs)
        return own(*args, **kwargs)

    twin = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, name: replacement},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(twin, forward)
    return twin
