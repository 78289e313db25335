"""One launch a step: bitsandbytes' Adam and AdamW over all tensors of a parameter group at once.

bitsandbytes launches a kernel for each tensor and waits for the device after each: under LoRA on an 8B model that is
448 launches and 28 ms a step, for kernels that take 3 ms. ``attach`` puts a ``step`` on the optimizer's instance that
launches once for all tensors of one dtype and kind of state, and waits for nothing. States are bitsandbytes' own, made
by its ``init_state`` and updated equal to the bit, so saving, loading and resuming are as before, with it or without.

What the kernels do not know is left to bitsandbytes' own ``update_step``, tensor by tensor: parameters whose options
were overridden, parameters or states elsewhere than on a GPU, and dtypes other than float32, float16 and bfloat16.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sloth_backend.findings import Edits, Finding, sign
from sloth_backend.hookspecs import hookimpl
from sloth_backend.phases import find_session
from sloth_backend.run import Run
from sloth_kernels.launch import HAS_TRITON, interpreting
from sloth_kernels.optimizers.batch import Batch, kind, refusal

CAPABILITY = "optimizer_step"
EDITS = "_sloth_optimizer_edits"
"""Instance attribute of a trainer: what was changed on its optimizer; or of an optimizer without a trainer."""
THEIRS = "bitsandbytes.optim.optimizer"
METHODS = ("update_step", "init_state", "get_config", "get_state_buffer", "prefetch_state")
"""What of bitsandbytes' ``Optimizer2State`` a step consists of, beside ``step`` itself."""
OPTIONS = {"max_unorm": 0.0, "skip_zeros": False, "percentile_clipping": 100, "block_wise": True}
"""Option of the optimizer's ``args`` -> the one value that the kernels know; versions have some of them each."""
SCHEDULED = "_wrapped_by_lr_sched"
"""Mark of a ``step`` that tells torch's schedulers when it was called."""
ACCELERATED = ("_optimizer_original_step_method", "_optimizer_patched_step_method")
"""Where Accelerate, with a gradient scaler, keeps the optimizer's ``step`` and one that notes that it was called."""


@hookimpl
def sloth_patch_optimizer(optimizer: Any, run: Run, edits: Edits) -> list[Finding]:
    """Attach to the optimizer of a loop of the user's own, once."""
    inner, _ = _unwrapped_optimizer(optimizer)
    if EDITS in vars(inner):
        return []
    own = Edits()
    findings = _attached(optimizer, run, own)
    if any(finding.action == "changed" for finding in findings):
        # The model remembers its edits; it must not keep the optimizer and its states alive.
        own.set(inner, EDITS, own)
        edits.on_undo(functools.partial(_take_back_step, weakref.ref(inner)))
    return findings


def _take_back_step(optimizer: weakref.ref[Any]) -> None:
    if (alive := optimizer()) is not None and EDITS in vars(alive):
        vars(alive)[EDITS].rollback()


@hookimpl
def sloth_patch_trainer(trainer: Any, run: Run, edits: Edits) -> list[Finding]:
    """Attach to the optimizer that the trainer was given, or will make; that one has its Finding when it is made."""
    own = Edits()
    # The model remembers its edits; it must not keep the trainer and its optimizer alive.
    setattr(trainer, EDITS, own)
    edits.on_undo(functools.partial(_take_back, weakref.ref(trainer)))
    if trainer.optimizer is not None:
        return _attached(trainer.optimizer, run, own)
    original = type(trainer).create_optimizer

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        own.rollback()
        found = _attached(optimizer, run, own) if isinstance(optimizer, Optimizer) else []
        findings = sign(found, __name__.rpartition(".")[2])
        session = find_session(self.model)
        if session is not None:
            session.findings += findings
        return optimizer

    trainer.create_optimizer = types.MethodType(create_optimizer, trainer)
    return []


def _take_back(trainer: weakref.ref[Any]) -> None:
    if (alive := trainer()) is not None:
        vars(alive).pop(EDITS).rollback()
        vars(alive).pop("create_optimizer", None)


def _attached(optimizer: Any, run: Run, edits: Edits) -> list[Finding]:
    if run.sharding == "fsdp2":
        name = type(_unwrapped_optimizer(optimizer)[0]).__name__
        return [Finding("skipped", name, "FSDP2 will shard its parameters, which the kernels take whole", CAPABILITY)]
    return attach(optimizer, edits)


def attach(optimizer: Any, edits: Edits) -> list[Finding]:
    """Let ``optimizer`` step in one launch, where it is bitsandbytes' Adam or AdamW; else say why not.

    Args:
        optimizer: live, with or without states; wrappers with an ``optimizer`` inside, as Accelerate's, are looked
            through and made to call the new step.
        edits: take the new step back.
    """
    optimizer, wrappers = _unwrapped_optimizer(optimizer)
    name = type(optimizer).__name__
    reason = _refusal(optimizer)
    if reason is not None:
        return [Finding("skipped", name, reason, CAPABILITY)]
    step = _bound_step(optimizer)
    edits.set(optimizer, "step", step)
    for wrapper in wrappers:
        _lead_to(wrapper, step, edits)
    return [Finding("changed", name, "all tensors of a group are updated in one launch, without a wait", CAPABILITY)]


def _unwrapped_optimizer(optimizer: Any) -> tuple[Any, list[Any]]:
    """The innermost optimizer, and its wrappers from the outside in."""
    wrappers = []
    while isinstance(inner := vars(optimizer).get("optimizer"), Optimizer):
        wrappers.append(optimizer)
        optimizer = inner
    return optimizer, wrappers


def _refusal(optimizer: Any) -> str | None:
    theirs = getattr(sys.modules.get(THEIRS), "Optimizer2State", None)
    if theirs is None or not isinstance(optimizer, theirs):
        return _other_refusal(optimizer)
    if optimizer.optimizer_name != "adam":
        return f"bitsandbytes' {optimizer.optimizer_name} steps by itself: the kernels know Adam and AdamW"
    if optimizer.is_paged:
        return "paged states may be in host memory, so bitsandbytes steps by itself"
    for option, known in OPTIONS.items():
        if (value := getattr(optimizer.args, option, known)) != known:
            return f"with {option}={value!r} bitsandbytes steps by itself; the kernels know {known!r}"
    if not HAS_TRITON or not (torch.cuda.is_available() or interpreting()) or torch.version.hip is not None:
        return "the kernels need Triton and a CUDA GPU"
    return _replaced(optimizer, theirs)


def _other_refusal(optimizer: Any) -> str:
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return "is neither Adam nor AdamW of bitsandbytes"
    if all(group.get("fused") for group in optimizer.param_groups):
        return "one launch already"
    return "torch's own steps by itself; with fused=True it is one launch"


def _replaced(optimizer: Any, theirs: type) -> str | None:
    """Why ``step`` is not bitsandbytes' own, or is ours already."""
    changed = [name for name in METHODS if getattr(type(optimizer), name, None) is not getattr(theirs, name, None)]
    changed += [name for name in METHODS if name in vars(optimizer)]
    if _unwrapped(type(optimizer).step) is not _unwrapped(theirs.step):
        changed.append("step")
    if changed:
        return f"{changed[0]} is not bitsandbytes' own"
    step = vars(optimizer).get("step")
    if isinstance(getattr(step, "one_launch", None), OneLaunch):
        return "steps in one launch already"
    if step is not None and not (hasattr(step, SCHEDULED) and _unwrapped(step) is _unwrapped(theirs.step)):
        return "its step was replaced by another one, which would be lost"
    return None


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _bound_step(optimizer: Any) -> types.MethodType:
    """The method ``step``, with torch's hooks around it as around any optimizer's.

    It tells schedulers that it was called, so that those that were made before need their wrapper no longer.
    """
    one_launch = OneLaunch(optimizer)

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        self._opt_called = True
        return one_launch(closure)

    hooked: Any = Optimizer.profile_hook_step(step)
    setattr(hooked, SCHEDULED, True)
    hooked.one_launch = one_launch
    return types.MethodType(hooked, optimizer)


def _lead_to(wrapper: Any, step: Callable[..., Any], edits: Edits) -> None:
    """Make a wrapper that kept the optimizer's ``step`` as it was call the new one."""
    original, patched = ACCELERATED
    if not {original, patched} <= vars(wrapper).keys():
        return

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        wrapper._accelerate_step_called = True
        return step(*args, **kwargs)

    edits.set(wrapper, original, step)
    edits.set(wrapper, patched, noted)


class OneLaunch:
    """The steps of one optimizer: what bitsandbytes' ``step`` does, in as few launches as there are kinds of tensors.

    Parameter groups, their options and the parameters that have gradients are looked at anew at every step.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._plans: dict[int, Plan] = {}
        self._seen: list[object] = []

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, and what ``closure`` returned, which computes gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        optimizer = self._optimizer
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        if not _same(self._now(), self._seen):
            self._plans.clear()
        for index, group in enumerate(optimizer.param_groups):
            self._step_group(index, group)
        self._seen = self._now()
        return loss

    def _now(self) -> list[object]:
        """Who has states, and which; and the parameters that have options of their own, by place and by identity."""
        state, manager = self._optimizer.state, self._optimizer.mng
        overrides = (*manager.index2config.values(), *manager.pid2config.values())
        return [*state, *state.values(), *overrides]

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        grads = [p.grad for p in group["params"]]
        trained = [p for p, grad in zip(group["params"], grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
        plan = self._plans.get(index)
        if plan is None or not plan.stands(trained, grads):
            self._plans.pop(index, None)
            plan = self._plans[index] = self._plan(index, group, trained)
        for places, batch in plan.batches:
            own = [grads[place] for place in places]
            batch.update(own, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        if plan.others:
            self._step_others(index, group, plan.others)

    def _plan(self, index: int, group: dict[str, Any], trained: list[Tensor]) -> Plan:
        manager, batches, others = self._optimizer.mng, defaultdict(list), []
        places = {p: i for i, p in enumerate(group["params"])}
        for i, p in enumerate(trained):
            state = self._optimizer.state[p]
            if not state:
                self._optimizer.init_state(group, p, index, places[p])
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            overridden = (index, places[p]) in manager.index2config or id(p) in manager.pid2config
            if overridden or refusal(p, state) is not None:
                others.append(p)
            else:
                batches[kind(p, state)].append((i, p, state))
        rows = [zip(*batch, strict=True) for batch in batches.values()]
        return Plan(trained, [(list(at), Batch(params, states)) for at, params, states in rows], others)

    def _step_others(self, index: int, group: dict[str, Any], others: Sequence[Tensor]) -> None:
        places = {p: i for i, p in enumerate(group["params"])}
        for p in others:
            self._optimizer.prefetch_state(p)
            self._optimizer.update_step(group, p, index, places[p])
        if any(p.is_cuda for p in others):
            torch.cuda.synchronize()  # as bitsandbytes does after each


class Plan(NamedTuple):
    """How the parameters of a group that have gradients are updated: in batches, or by bitsandbytes."""

    trained: list[Tensor]
    batches: list[tuple[list[int], Batch]]
    """Each with the places in ``trained`` of its parameters."""
    others: list[Tensor]

    def stands(self, trained: list[Tensor], grads: list[Tensor]) -> bool:
        """Whether it still holds for these, whose gradients are ``grads``."""
        return _same(trained, self.trained) and all(
            batch.stands([grads[place] for place in places]) for places, batch in self.batches
        )


def _same(ours: Sequence[object], theirs: Sequence[object]) -> bool:
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
