"""Layer programs: a decoder layer that can be taken apart runs as one function that keeps what the memory plan says.

``layouts`` is what is known of layers, ``assemble`` builds programs from it, ``probe`` asks the model whether they are
right, ``layer``, ``costs``, ``head`` and ``sharded`` say what they cost, ``planner`` plans and ``passes`` runs them,
``first_input`` knows whether anybody wants the gradient of what they start from, ``given`` reads a plan that another
plugin made. docs/memory-plan.md tells the whole.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sloth_backend.findings import Edits, Finding
from sloth_backend.hookspecs import hookimpl
from sloth_backend.plan import CAPABILITY as MEMORY_PLAN
from sloth_backend.plan import MemoryPlan
from sloth_backend.roles import Role
from sloth_backend.run import BY_MODULE, REASON_BY_MODULE, Run
from sloth_kernels.dense_cache import DenseCache
from sloth_kernels.op import Op
from sloth_kernels.recording import CudaCapture
from sloth_plugins.kernel_patching.match import Matcher
from sloth_plugins.kernel_patching.modules import HOOKS, Children, is_heard
from sloth_plugins.layer_programs.assemble import Assembler, LayerProgram, MisfitError
from sloth_plugins.layer_programs.checkpointing import leave_alone
from sloth_plugins.layer_programs.first_input import FirstInput
from sloth_plugins.layer_programs.given import for_programs
from sloth_plugins.layer_programs.layer import Layer
from sloth_plugins.layer_programs.passes import Passes
from sloth_plugins.layer_programs.planner import Planner, shared_budget
from sloth_plugins.layer_programs.probe import Seen, constants_of, disagreement, evaluating, observe
from sloth_plugins.offloaded_checkpointing import make_ring
from sloth_plugins.offloaded_checkpointing.seam import Rings, checkpointed_layers
from sloth_plugins.program_layers import forget_weights, mark, set_planner

CAPABILITY = "layer_program"
OPS = ("rms_norm", "rope", "glu", "lora", "attention")
"""What a program is made of: where one of them is switched off, modules are patched one by one instead."""
REPLACED = Finding(
    "warned",
    "layers",
    "modules inside layers were replaced after the backend was switched on, as get_peft_model does: such layers run as "
    "they are, not as programs; call optimize after PEFT, or undo(model) and optimize again",
    CAPABILITY,
)


@hookimpl
def sloth_patch_model(
    model: nn.Module, run: Run, ops: Mapping[str, Op], roles: list[Role], plan: MemoryPlan | None, edits: Edits
) -> list[Finding]:
    """Run every decoder layer that allows it as a program; one Finding a layer.

    They follow ``plan``, where another plugin made one that they can follow, else one of their own for each shape of
    pass.
    """
    layers = checkpointed_layers(model)
    off = [name for name in OPS if name not in ops or not run.config.allows(name)]
    if off or not layers or run.sharding == BY_MODULE:
        reason = f"kernels leave out {', '.join(off)}" if off else "the model has no layers as transformers' have"
        reason = REASON_BY_MODULE if run.sharding == BY_MODULE else reason
        return [Finding("skipped", "layers", reason, CAPABILITY)]
    # Here all ranks are at one point; shapes, for which plans are made, come to each of them at times of their own.
    budget = shared_budget(run)
    seen = observe(model, list(layers.values()))
    if isinstance(seen, str):
        return [Finding("skipped", name, seen, CAPABILITY) for name in layers]
    assembler = Assembler(
        Matcher(run.dtype or torch.get_default_dtype()),
        ops,
        {role.name: role for role in reversed(roles)},
        getattr(getattr(model, "config", None), "_attn_implementation", "eager"),
    )
    with evaluating(model):
        outcomes = {name: _program_for(layer, assembler, seen[layer]) for name, layer in layers.items()}
    made = {layers[name]: program for name, program in outcomes.items() if isinstance(program, LayerProgram)}
    findings = [_finding(name, outcome) for name, outcome in outcomes.items()]
    if made:
        given = for_programs(plan, layers, made) if plan is not None else None
        if isinstance(given, str):
            findings.append(Finding("warned", "memory", f"{given}; layers are planned without it", MEMORY_PLAN))
            given = None
        with evaluating(model):
            planned = [_planned_layer(program, seen[layer][0]) for layer, program in made.items()]
        _install(model, run, made, planned, given, budget, edits)
        forget_weights(model)
    return findings


def _program_for(layer: nn.Module, assembler: Assembler, seen: Sequence[Seen]) -> LayerProgram | str:
    """The first candidate that computes what the layer was seen to compute, or why none does."""
    if "forward" in vars(layer):
        owner = getattr(vars(layer)["forward"], "__module__", None) or "another library"
        return f"its forward is already replaced, by {owner}"
    try:
        candidates = assembler.candidates(layer)
    except MisfitError as misfit:
        return str(misfit)
    reasons = [disagreement(candidate.program, layer, seen) for candidate in candidates]
    agreeing = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if not reason]
    return agreeing[0] if agreeing else reasons[0]


def _finding(name: str, outcome: LayerProgram | str) -> Finding:
    if isinstance(outcome, str):
        return Finding("skipped", name, outcome, CAPABILITY)
    stages = Counter(type(stage).__name__.lower() for stage in outcome.program.stages)
    return Finding("changed", name, f"one program of {sum(stages.values())} stages", CAPABILITY)


def _install(
    model: nn.Module,
    run: Run,
    made: Mapping[nn.Module, LayerProgram],
    layers: Sequence[Layer],
    given: MemoryPlan | None,
    budget: int | None,
    edits: Edits,
) -> None:
    """Replace the forwards of the layers and take their checkpointing over."""
    cache = DenseCache([program.groups for program in made.values()])
    offloads = run.config.checkpointing == "offload" and run.device is not None and run.device.type == "cuda"
    planner = Planner(model, run, layers, offloads, given, budget)
    capture = CudaCapture(run.device) if run.device is not None and run.device.type == "cuda" else None
    rings, first = Rings(make_ring) if offloads else None, FirstInput.of(model, next(iter(made)), edits)
    passes = Passes(model, layers, planner, cache, rings, capture, first)
    for index, (layer, program) in enumerate(made.items()):
        forward = _forward(layer, program, passes, index)
        edits.set(layer, "forward", types.MethodType(forward, layer))
        mark(layer, edits)
    set_planner(model, planner, edits)
    leave_alone(model, list(made), edits)
    edits.on_undo(lambda: cache.hold(0))
    edits.on_undo(passes.replays.stop)


def _planned_layer(made: LayerProgram, seen: Seen) -> Layer:
    return Layer(made, seen.hidden, constants_of(seen.kwargs) or {})


def _watched(layer: nn.Module) -> list[Any]:
    """The hook tables of everything inside the layer: a program would not call them."""
    return [vars(module)[table] for module in layer.modules() if module is not layer for table in HOOKS]


def _forward(layer: nn.Module, made: LayerProgram, passes: Passes, index: int) -> Callable[..., Any]:
    """The layer's forward: its program where the call allows it, else its own."""
    original, owner, watched = type(layer).forward, weakref.ref(layer), _watched(layer)
    children = Children(layer, {live.module for live in made.linears})

    @functools.wraps(original)
    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # A deep copy of the layer brings this method along, but the program reads the original's weights.
        foreign = args or self is not owner() or is_heard(watched)
        if children.were_replaced() and self is owner():
            passes.warn(REPLACED)
            foreign = True
        constants = None if foreign else constants_of(_without_idle_cache(self, kwargs))
        if constants is None or any(live.obstacle() for live in made.linears):
            return original(self, hidden_states, *args, **kwargs)
        return passes.run_layer(index, hidden_states, constants)

    return forward


def _without_idle_cache(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without a cache that has nothing of this layer and, in training, will never be read."""
    cache = kwargs.get("past_key_values")
    if cache is None or not (layer.training and torch.is_grad_enabled()):
        return kwargs
    index = next((vars(m)["layer_idx"] for m in layer.modules() if "layer_idx" in vars(m)), 0)
    return kwargs if cache.get_seq_length(index) else {**kwargs, "past_key_values": None, "use_cache": None}
