"""A program: stages over named values, run as one autograd function that keeps only what it is told to keep.

A stage reads some values and writes others; its backward needs some of both. From the set of values that are kept
between forward and backward a Schedule follows: in forward, where each value dies; in backward, which stages run again
to bring back what a stage needs. So a layer that keeps everything, one that recomputes everything and all between are
the same program under different sets, and a value may be given up at any time: it can be computed again.

``x`` is the input and ``y`` the output; other inputs are constants without gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from sloth_kernels.adapters import autocast_dtype, without_autocast
from sloth_kernels.recording import Tape
from sloth_kernels.relief import givers, with_relief
from sloth_kernels.schedule import INPUT, OUTPUT, Form, Schedule, Step, schedule
from sloth_kernels.values import NOWHERE, Here, Park, Parked, Values

NOTHING: frozenset[str] = frozenset()


class Bound(Protocol):
    """A stage with the parameters it has at one call."""

    operands: Sequence[torch.Tensor | None]
    """What it is differentiable in beside its inputs, in a fixed order."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """One value for each of the stage's ``writes``. Changes none of its inputs."""
        ...

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> tuple[Sequence[Any], Sequence[torch.Tensor | None]]:
        """Gradients of its ``reads`` and of its operands.

        Args:
            values: at least the stage's ``needs``.
            dys: of each of its ``writes``; None where nothing depends on it.
            dxs: what other stages have already added to the gradient of each of its ``reads``, or None: the sum is to
                be returned, in new memory.
            wants: whether each of its ``reads``, then each operand, needs a gradient; the others may be None.
        """
        ...


class Stage(Protocol):
    """One step of a program. Stages with equal ``reads``, ``writes`` and ``needs`` share their schedules."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    needs: tuple[str, ...]
    """The values that its backward looks at: of its reads and writes, or of what stages before it wrote."""

    def bind(self, autocast: torch.dtype | None) -> Bound:
        """The stage as it is now: its parameters may have been replaced, its adapters switched since the last call.

        ``autocast`` is what autocast computes in around the call; it is off while the stage runs.
        """
        ...


class Program:
    """Stages in the order in which they run, reading ``x`` and ``constants``, the last of them writing ``y``."""

    def __init__(self, stages: Sequence[Stage], constants: Iterable[str] = ()) -> None:
        self.stages = tuple(stages)
        self.constants = frozenset(constants)
        self.forms = tuple(Form(stage.reads, stage.writes, stage.needs) for stage in self.stages)
        self._schedules: dict[frozenset[str], Schedule] = {}
        self._wants: dict[tuple[Any, ...], list[list[bool] | None]] = {}
        known = self.constants | {INPUT}
        for form in self.forms:
            if missing := set(form.reads) - known:
                raise ValueError(f"a stage reads {', '.join(sorted(missing))}, which no stage before it writes")
            known |= set(form.writes)

    @functools.cached_property
    def savable(self) -> frozenset[str]:
        """The values that some backward looks at: keeping any other would be of no use."""
        return frozenset(name for form in self.forms for name in form.needs) - self.constants - {INPUT}

    def schedule(self, kept: frozenset[str]) -> Schedule:
        """See ``schedule``."""
        if kept not in self._schedules:
            self._schedules[kept] = schedule(self.forms, self.constants, kept)
        return self._schedules[kept]

    def wants(self, counts: Sequence[int], needs: Sequence[bool]) -> list[list[bool] | None]:
        """What each stage's backward is asked for: each of its ``reads``, then each operand; None where it is nothing.

        ``counts`` are the stages' numbers of operands; ``needs`` says which of x and all operands need a gradient.
        """
        key = (*counts, *needs)
        if key not in self._wants:
            self._wants[key] = _wants(self.forms, self.constants, counts, needs)
        return self._wants[key]

    def __call__(
        self,
        x: torch.Tensor,
        constants: Mapping[str, Any],
        kept: frozenset[str] | None = None,
        on_relief: Callable[[], None] | None = None,
        park: Park | None = None,
        tape: Tape | None = None,
    ) -> torch.Tensor:
        """``y`` for ``x`` and the constants, differentiable once in x and in the stages' operands.

        Args:
            x: the input; autograd saves it, through the saved-tensor hooks that are in force.
            constants: name -> value; without gradients.
            kept: which values stay for backward; None for all that are of use.
            on_relief: called when kept values had to be given up, the device being out of memory.
            park: which of the kept values wait elsewhere, and how they get there.
            tape: recordings of passes like this one, to be played or made; the caller keeps nothing of a pass when
                the next begins. None to launch every kernel by itself.
        """
        autocast = autocast_dtype(x)
        bound = [stage.bind(autocast) for stage in self.stages]
        operands = [operand for stage in bound for operand in stage.operands]
        frame = Frame(self, bound, constants)
        with without_autocast(x):
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands)):
                frame.kept = self.savable if kept is None else kept
                frame.on_relief, frame.park = on_relief, park or NOWHERE
                if tape is not None and park is None and tape.takes(frame, bound):
                    frame.tape, frame.bound = tape, tape.bound
                return _Run.apply(x, frame, *operands)
            with torch.no_grad():
                return frame.run_forward(x, NOTHING)

    def trained(self, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
        """The operands of its stages that want a gradient now, in a call under ``autocast``."""
        operands = [operand for stage in self.stages for operand in stage.bind(autocast).operands]
        return [operand for operand in operands if operand is not None and operand.requires_grad]

    def trace(self, x: torch.Tensor, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Every value of one forward run without gradients, ``y`` among them."""
        autocast = autocast_dtype(x)
        frame = Frame(self, [stage.bind(autocast) for stage in self.stages], constants)
        with torch.no_grad(), without_autocast(x):
            frame.run_forward(x, frozenset(name for form in self.forms for name in form.writes))
        return frame.values


class Frame:
    """One call of a program: what it has at hand, from forward until its backward is over."""

    def __init__(self, program: Program, bound: Sequence[Bound], constants: Mapping[str, Any]) -> None:
        self.program = program
        self.bound = bound
        self.constants = constants
        self.kept = NOTHING
        self.values: dict[str, Any] = {}
        self.parked: dict[str, Parked] = {}
        self.park = NOWHERE
        self.tape: Tape | None = None
        self.on_relief: Callable[[], None] | None = None

    def run_forward(self, x: torch.Tensor, kept: frozenset[str]) -> torch.Tensor:
        """Compute y; afterwards ``values`` and ``parked`` have what is kept."""
        values, away = {**self.constants, INPUT: x}, kept & self.park.names
        here = kept - away if away else kept
        steps = self.program.schedule(here).forward
        if self.tape is None:
            self.run(steps, values, away)
        else:
            self.tape.forward(self, steps, values)
        self.values = {name: values[name] for name in here}
        return values[OUTPUT]

    def run(self, steps: Iterable[Step], values: dict[str, Any], away: frozenset[str] = NOTHING) -> None:
        """Forward's ``steps``, on ``values``."""
        for i, _, frees in steps:
            self._run_stage(i, values)
            if away:
                self._park(self.program.forms[i].writes, values, away)
            for name in frees:
                del values[name]

    def _park(self, names: Iterable[str], values: Mapping[str, Any], away: frozenset[str]) -> None:
        for name in names:
            if name in away:
                self.parked[name] = self.park.put(values[name])

    def _run_stage(self, i: int, values: dict[str, Any]) -> None:
        form = self.program.forms[i]
        written = with_relief(self.bound[i].forward, *[values[name] for name in form.reads], spare=self)
        for name, value in zip(form.writes, written, strict=True):
            values[name] = value

    def give_up(self) -> bool:
        """Let go of everything that can be computed again; whether that was anything."""
        if not self.values:
            return False
        self.values, self.parked, self.kept = {}, {}, NOTHING
        if self.on_relief is not None:
            self.on_relief()
        return True

    def run_backward(
        self, x: Parked, dy: torch.Tensor, needs: Sequence[bool]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of x and of all operands; ``needs`` says which of them are wanted. A second call recomputes all."""
        values, kept = Values({**self.constants, **self.values}, {**self.parked, INPUT: x}), self.kept
        self.values, self.parked, self.kept = {}, {}, NOTHING
        counts = [len(bound.operands) for bound in self.bound]
        wants = self.program.wants(counts, needs)
        grads: dict[str, Any] = {OUTPUT: dy}
        steps, tape = self.program.schedule(kept).backward, self.tape
        if tape is None:
            own = self.run_back(steps, values, grads, wants)
        else:
            self.tape, own = None, tape.backward(self, steps, values, grads, wants)
        none = [(None,) * count for count in counts]
        return grads.get(INPUT), [grad for i in range(len(counts)) for grad in own.get(i, none[i])]

    def run_back(
        self, steps: Iterable[Step], values: Values, grads: dict[str, Any], wants: Sequence[list[bool] | None]
    ) -> dict[int, Sequence[torch.Tensor | None]]:
        """Backward's ``steps``, on ``values`` and ``grads``; returns the gradients of the operands of each stage."""
        own: dict[int, Sequence[torch.Tensor | None]] = {}
        for i, is_backward, frees in steps:
            values.dying = frees
            if not is_backward:
                self._run_stage(i, values)
            elif (wanted := wants[i]) and (found := self._run_stage_backward(i, values, grads, wanted)):
                own[i] = found
            values.let_go(frees)
        return own

    def _run_stage_backward(
        self, i: int, values: dict[str, Any], grads: dict[str, Any], wanted: Sequence[bool]
    ) -> Sequence[torch.Tensor | None]:
        """Gradients of the stage's operands; those of its reads go to ``grads``. Empty where y is not made of it."""
        reads, writes, _ = self.program.forms[i]
        dys = [grads.pop(name, None) for name in writes]
        if all(dy is None for dy in dys):
            return ()
        dxs = [grads.get(name) for name in reads]
        new, own = with_relief(self.bound[i].backward, values, dys, dxs, wanted, spare=self)
        for name, grad in zip(reads, new, strict=True):
            if grad is not None:
                grads[name] = grad
        return own


def _wants(
    forms: Sequence[Form], constants: Iterable[str], counts: Sequence[int], needs: Sequence[bool]
) -> list[list[bool] | None]:
    values, start = dict.fromkeys(constants, False) | {INPUT: needs[0]}, 1
    result: list[list[bool] | None] = []
    for form, count in zip(forms, counts, strict=True):
        wanted = [*(values[name] for name in form.reads), *needs[start : start + count]]
        start += count
        values.update(dict.fromkeys(form.writes, any(wanted)))
        result.append(wanted if any(wanted) else None)
    return result


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frame: Frame, *operands: torch.Tensor | None) -> torch.Tensor:
        # The operands are read where they are; autograd saves them to see that nobody changes them in between.
        ctx.save_for_backward(x, *operands)
        ctx.frame = frame
        y = frame.run_forward(x, frame.kept)
        givers.add(frame)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("a layer program has no second derivative: call backward without create_graph=True")
        # The input is not looked at before it is needed: where it has to come back, the first stages run meanwhile.
        x = Here(lambda: ctx.saved_tensors[0])
        givers.discard(ctx.frame)
        x_needs, _, *needs = ctx.needs_input_grad
        with without_autocast(dy):
            dx, operand_grads = ctx.frame.run_backward(x, dy, (x_needs, *needs))
        return dx, None, *operand_grads
