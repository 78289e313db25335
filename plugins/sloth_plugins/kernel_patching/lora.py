"""Adapted linears outside larger patches: the product, the adapters and their dropout in one autograd Function."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.run import BY_MODULE, REASON_BY_MODULE, Run
from sloth_kernels.op import Op
from sloth_kernels.ops.lora import lora_linears
from sloth_plugins.kernel_patching.linears import LiveLinear
from sloth_plugins.program_layers import LIVE

CAPABILITY = "lora"


def patch_linears(
    model: nn.Module, run: Run, ops: Mapping[str, Op], edits: Edits, taken: set[nn.Module]
) -> list[Finding]:
    """Let every linear that PEFT adapts compute by the op ``lora``; one Finding each.

    ``taken`` are modules that another patch computes, with all that is inside them. A call that the op cannot take
    (other arguments than x; merged, disabled or mixed adapters) goes to the module's own forward.
    """
    tuner_layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if tuner_layer is None or CAPABILITY not in ops or not run.config.allows(CAPABILITY):
        return []
    inside = _inside(taken)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, tuner_layer)}
    if run.sharding == BY_MODULE:
        return [Finding("skipped", name, REASON_BY_MODULE, CAPABILITY) for name in adapted]
    return [_patch(name, module, run, edits) for name, module in adapted.items() if module not in inside]


def _inside(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {descendant for module in modules for descendant in module.modules()}


def _patch(name: str, module: nn.Module, run: Run, edits: Edits) -> Finding:
    live = LiveLinear.of(module)
    if isinstance(live, str):
        return Finding("skipped", name, live, CAPABILITY)
    if live.in_4bit and not run.config.allows("nf4"):
        return Finding("skipped", name, "its weight is 4-bit, and the op nf4 is switched off", CAPABILITY)
    edits.set(module, LIVE, live)
    edits.set(module, "forward", types.MethodType(_live_forward(type(module).forward), module))
    return Finding("changed", name, f"lora op over a {live.describe()}", CAPABILITY)


@functools.cache
def _live_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Found through the module, so that a copy of the model computes with its own weights.
        live: LiveLinear = self._sloth_linear
        if args or kwargs or live.obstacle() is not None:
            return original(self, x, *args, **kwargs)
        return lora_linears(x, (live.read(),))[0]

    return forward
