"""Bytes as predicted beside bytes as counted, and levels that make sense."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from integration_tests.plugins.layer_programs.common import adapted, switched_on, takes
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_backend.plan import Level
from sloth_kernels import launch
from sloth_kernels.program import Program
from sloth_plugins.layer_programs.costs import Estimate, Shape, widths

ROWS, LENGTH = 4, 128
NAMES = [name for name in ("llama", "qwen3", "gemma2", "olmo2", "phi3") if takes(make_model(name), "sdpa")]


@functools.cache
def observed(name: str) -> tuple[Program, torch.Tensor, Any]:
    """The program of an architecture's first layer, with the input and constants of one call.

    Attention is torch's own: what the eager one holds is known to autograd alone.
    """
    model, calls = adapted(make_model(name)), []
    model.set_attn_implementation("sdpa")
    switched_on(model).train()
    original = Program.__call__

    def noted(self: Program, x: torch.Tensor, constants: Any, *rest: Any) -> torch.Tensor:
        calls.append((self, x.detach(), constants))
        return original(self, x, constants, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__call__", noted)
        model(**make_batches(1, ROWS, LENGTH)[0])
    return calls[0]


@functools.cache
def estimate(name: str) -> Estimate:
    program, x, constants = observed(name)
    return Estimate(program, widths(program.trace(x, constants), x), Shape(ROWS * LENGTH, LENGTH))


# Levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_levels_go_from_all_of_use_to_nothing(name: str) -> None:
    levels, program = estimate(name).levels(), observed(name)[0]
    assert levels[0].name == "keep"
    assert not any(estimate(name).size[value] for value in program.savable - levels[0].kept)
    assert any(level.device_bytes == 0 and level.offloaded == frozenset({"x"}) for level in levels)
    assert any(level.host_bytes == 0 and not sum(estimate(name).size[v] for v in level.kept) for level in levels)


@pytest.mark.parametrize("name", NAMES)
def test_slower_levels_are_smaller(name: str) -> None:
    """Each than every faster one: between the passes, or while its backward runs."""
    for faster, slower in itertools.combinations(estimate(name).levels(), 2):
        at_work = [level.device_bytes + level.working_bytes for level in (faster, slower)]
        assert faster.seconds <= slower.seconds
        assert faster.device_bytes > slower.device_bytes or at_work[0] > at_work[1]


def again(of: Estimate, kept: frozenset[str]) -> float:
    """Seconds of what is computed again."""
    return sum(of.seconds[step.stage] for step in of.program.schedule(kept).backward if not step.is_backward)


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=200, deadline=None)
def test_keeping_one_value_more_never_costs_time(name: str, data: st.DataObject) -> None:
    of = estimate(name)
    savable = sorted(of.program.savable)
    kept = data.draw(st.frozensets(st.sampled_from(savable)))
    more = kept | {data.draw(st.sampled_from(savable))}
    rounding = 1e-9 * sum(of.seconds)
    assert again(of, more) <= again(of, kept) + rounding <= sum(of.seconds) + 2 * rounding


@pytest.mark.parametrize("name", NAMES)
def test_what_a_level_says_of_itself(name: str) -> None:
    of = estimate(name)
    for level in of.levels():
        x = of.size["x"]
        on_device = of.held(level.kept) + (0 if level.offloaded else x)
        assert (level.device_bytes, level.host_bytes) == (on_device, x if level.offloaded else 0)
        assert level.working_bytes >= of.backward_bytes(level.kept) > x


def test_longer_rows_make_attention_dearer() -> None:
    program, x, constants = observed("llama")
    sizes = widths(program.trace(x, constants), x)
    of = {length: Estimate(program, sizes, Shape(8192, length)) for length in (128, 8192)}
    attention = next(i for i, stage in enumerate(program.stages) if type(stage).__name__ == "Attention")
    assert of[8192].seconds[attention] > 2 * of[128].seconds[attention]
    others = [i for i in range(len(program.stages)) if i != attention]
    assert [of[8192].seconds[i] for i in others] == [of[128].seconds[i] for i in others]


# Bytes, counted -------------------------------------------------------------------------------------------------------


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """What the tensors among ``values`` lie in, a view in that of its base."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in found}


class Tally(TorchDispatchMode):
    """Bytes of the tensors that were made since it began and still live; ``most`` of them after any stage."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
        return result

    def look(self) -> int:
        """Count them now."""
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        now = sum(size for _, size in self.made.values())
        self.most = max(self.most, now)
        return now


class Watched:
    """A bound stage after each run of which the tally is taken."""

    def __init__(self, bound: Any, look: Callable[[], int]) -> None:
        self.bound, self.look, self.operands = bound, look, bound.operands

    def forward(self, *inputs: Any) -> Any:
        written = self.bound.forward(*inputs)
        self.look()
        return written

    def backward(self, *arguments: Any) -> Any:
        gradients = self.bound.backward(*arguments)
        self.look()
        return gradients


@contextmanager
def tallied(program: Program) -> Iterator[Tally]:
    """Looks after every stage of ``program``; nothing is counted before the tally is entered itself."""
    tally = Tally()
    with pytest.MonkeyPatch.context() as patch:
        for stage in program.stages:
            patch.setattr(stage, "bind", lambda autocast, bind=stage.bind: Watched(bind(autocast), tally.look))
        yield tally


def backward_most(name: str, kept: frozenset[str]) -> int:
    """The most bytes after any stage of a backward, beyond those that were there before it."""
    program, x, constants = observed(name)
    x = x.clone().requires_grad_()
    with tallied(program) as tally, tally:
        y = program(x, constants, kept)
        before = tally.most = tally.look()
        torch.autograd.grad(y, x, torch.ones_like(y))
    return tally.most - before


@contextmanager
def nothing_overwritten(program: Program) -> Iterator[None]:
    """As plain torch runs it: only kernels put gradients where values were."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in program.stages:
            if getattr(stage, "overwrites", ()) and not launch.interpreting():
                patch.setattr(stage, "overwrites", ())
        yield


def levels_of(name: str) -> list[Level]:
    return [level for level in estimate(name).levels() if not level.offloaded]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_backward(name: str) -> None:
    """Within a quarter: gradients that share memory are counted apart, those of adapters not at all."""
    off = {}
    for level in levels_of(name):
        with nothing_overwritten(observed(name)[0]):
            predicted = estimate(name).backward_bytes(level.kept)
        off[level.name] = predicted / backward_most(name, level.kept)
    assert not {level: share for level, share in off.items() if not 0.75 < share < 1.25}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_forward(name: str) -> None:
    program, x, constants = observed(name)
    with tallied(program) as tally, tally, torch.no_grad():
        program(x, constants)
    assert 0.75 < estimate(name).forward_bytes() / tally.most < 1.25


@pytest.mark.parametrize("name", NAMES)
def test_bytes_kept_between_the_passes(name: str) -> None:
    program, x, constants = observed(name)
    x = x.clone().requires_grad_()
    for level in levels_of(name):
        tally = Tally()
        with tally:
            y = program(x, constants, level.kept)
        tally.look()
        predicted = level.device_bytes - estimate(name).size["x"] + y.nbytes
        assert predicted == pytest.approx(tally.most, rel=0.02), level.name
