"""A learning rate of their own for the embeddings: parameter groups split in place, schedules told of it.

A matrix of the vocabulary's size learns from few rows in each step, and its entries are of another scale than those of
an adapter: it wants a smaller rate, five to ten times smaller by rule of thumb.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sloth_backend.findings import Finding
from sloth_backend.run import find_embedding

if TYPE_CHECKING:
    from torch import nn

OPTION = "embedding_learning_rate"
CAPABILITY = "embedding_training"
MARK = "_sloth_embedding_rate"
"""Instance attribute of an optimizer whose groups are split."""


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """What trains of the input and the output embeddings of a causal language model inside any wrapper, tied ones once.

    Whole matrices, copies (``modules_to_save``) and single rows (``trainable_token_indices``); not the low-rank factors
    of LoRA, which learn as those of other layers do.
    """
    found: dict[int, nn.Parameter] = {}
    for module in (find_embedding(model, "input"), find_embedding(model, "output")):
        named = module.named_parameters() if module is not None else ()
        found |= {id(p): p for name, p in named if p.requires_grad and "lora_" not in name}
    return list(found.values())


def split_groups(
    optimizer: Any, parameters: Iterable[nn.Parameter], rate: float, schedulers: Iterable[Any] = ()
) -> Callable[[], None]:
    """Let ``parameters`` learn at ``rate``, in groups of their own behind the others; what else a group says stays.

    Args:
        optimizer: with or without states; wrappers with an ``optimizer`` inside, as Accelerate's, are looked through.
        parameters: those that train of the embeddings.
        rate: their learning rate, which schedules scale as they do the others'.
        schedulers: those that were made for ``optimizer`` already.

    Returns:
        What puts the parameters back into the groups that they came from.

    Raises:
        SlothConfigError: the optimizer does not hold the parameters, or a schedule cannot be told.
    """
    from sloth_backend.config import SlothConfigError

    optimizer, schedules = unwrapped(optimizer), [unwrapped(scheduler, "scheduler") for scheduler in schedulers]
    if hasattr(optimizer, MARK):
        return lambda: None
    chosen = {id(p) for p in parameters}
    groups = getattr(optimizer, "param_groups", [])
    if problem := _problem(optimizer, chosen, groups, schedules):
        raise SlothConfigError([problem])
    own = [(place, [p for p in group["params"] if id(p) in chosen]) for place, group in enumerate(groups)]
    before = [group["params"] for group in groups]
    for place, moved in own:
        if moved:
            _move(optimizer, place, moved, rate, schedules)
    setattr(optimizer, MARK, rate)
    alive = weakref.ref(optimizer)
    return lambda: _join(alive(), before, schedules)


def rate_finding(parameters: list[nn.Parameter], rate: float) -> Finding:
    """What was done, for the report."""
    story = f"{len(parameters)} tensors of the embeddings learn at {rate:g}, which schedules scale as the others' rate"
    return Finding("changed", "optimizer", story, CAPABILITY)


def unwrapped(outer: Any, name: str = "optimizer") -> Any:
    """The optimizer, or schedule, inside Accelerate's wrappers."""
    while type(outer).__module__.startswith("accelerate.") and (inner := vars(outer).get(name)) is not None:
        outer = inner
    return outer


def _problem(optimizer: Any, chosen: set[int], groups: list[Any], schedules: list[Any]) -> str | None:
    name = type(optimizer).__name__
    if not chosen:
        return (
            f"{OPTION} is set, but no embedding trains: add modules_to_save=['embed_tokens', 'lm_head'] or "
            "trainable_token_indices to the LoraConfig, train all parameters, or leave the option out"
        )
    held = {id(p) for group in groups for p in group["params"]}
    if not chosen <= held or not all("lr" in group for group in groups):
        return f"{OPTION} needs an optimizer that holds the embeddings in a group with a learning rate; {name} does not"
    unknown = [type(schedule).__name__ for schedule in schedules if not hasattr(schedule, "lr_lambdas")]
    if unknown or (not schedules and hasattr(optimizer.step, "_wrapped_by_lr_sched")):
        which = unknown[0] if unknown else "a schedule that was not handed over with it"
        return (
            f"{OPTION} is set, and {name} has {which} already, which cannot be told of another group: use one of "
            "transformers.get_scheduler, prepared with the optimizer, or give the groups their learning rates yourself"
        )
    return None


def _move(optimizer: Any, place: int, moved: list[nn.Parameter], rate: float, schedules: list[Any]) -> None:
    group, ids = optimizer.param_groups[place], {id(p) for p in moved}
    options = {name: value for name, value in group.items() if name != "params"}
    group["params"] = [p for p in group["params"] if id(p) not in ids]
    factors = [schedule.lr_lambdas[place](schedule.last_epoch) for schedule in schedules]
    options["lr"] = rate * (factors[0] if factors else 1.0)
    if "initial_lr" in options:
        options["initial_lr"] = rate
    optimizer.add_param_group({**options, "params": moved})
    for schedule in schedules:
        schedule.base_lrs.append(rate)
        schedule.lr_lambdas.append(schedule.lr_lambdas[place])
        schedule._last_lr.append(options["lr"])


def _join(optimizer: Any, before: list[list[Any]], schedules: list[Any]) -> None:
    if optimizer is None or not hasattr(optimizer, MARK):
        return
    delattr(optimizer, MARK)
    del optimizer.param_groups[len(before) :]
    # The groups may be others by now: Accelerate loads the optimizer's own state into it.
    for group, parameters in zip(optimizer.param_groups, before, strict=True):
        group["params"] = parameters
    for schedule in schedules:
        for values in (schedule.base_lrs, schedule.lr_lambdas, schedule._last_lr):
            del values[len(before) :]
