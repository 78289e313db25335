"""Kernel patching: modules matched by structure and probe run on the ops, the loss never holds the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.roles import Role
from sloth_backend.run import BY_MODULE, REASON_BY_MODULE, Run, is_causal_lm
from sloth_kernels.op import Op
from sloth_kernels.registry import load_ops
from sloth_plugins.kernel_patching.lora import patch_linears
from sloth_plugins.kernel_patching.loss import CAPABILITY, patch_loss
from sloth_plugins.kernel_patching.patch import patch_modules
from sloth_plugins.kernel_patching.roles import ROLES
from sloth_plugins.program_layers import program_layers


@hookimpl
def sloth_ops() -> list[Op]:
    """The ops of ``sloth_kernels``."""
    return load_ops()


@hookimpl
def sloth_roles() -> list[Role]:
    """The roles of ``roles.py``."""
    return list(ROLES)


@hookimpl
def sloth_check(run: Run, model: Any) -> list[str]:
    """Only causal language models have what the loss and the roles are for."""
    if model is None or is_causal_lm(model):
        return []
    return [
        f"the model is a {type(model).__name__}, which is no causal language model (no output embeddings, or an "
        "encoder-decoder): load it with AutoModelForCausalLM, or leave the backend off for it"
    ]


@hookimpl
def sloth_patch_model(
    model: nn.Module, run: Run, ops: Mapping[str, Op], roles: list[Role], edits: Edits
) -> list[Finding]:
    """Patch modules that match, adapted linears outside layer programs and, if nothing stands in the way, the loss."""
    findings = patch_modules(model, run, ops, roles, edits)
    findings += patch_linears(model, run, ops, edits, program_layers(model))
    if run.config.allows(CAPABILITY) and CAPABILITY in ops:
        findings.append(_patched_loss(model, run, ops[CAPABILITY], edits))
    return findings


def _patched_loss(model: nn.Module, run: Run, op: Op, edits: Edits) -> Finding:
    if run.sharding == BY_MODULE:
        return Finding("skipped", "loss", REASON_BY_MODULE, CAPABILITY)
    return patch_loss(model, op, edits)
