"""Recordings: what a run of stages did to the device, done again in one launch, where the host is the limit.

Short passes wait for the host, which launches kernel after kernel. A CUDA graph launches what was launched before, at
the same addresses: so what a recording reads is copied to where it was read, and what it writes is overwritten by the
next pass. Attention stays outside, as its kernels follow from the documents of each pass; a layer is played in two
recordings forward and two backward around it.

A recording holds good while the objects behind its stages are the very same (``marks_of``).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from sloth_kernels.packing import Layout, nbytes
from sloth_kernels.schedule import OUTPUT, Form, Step
from sloth_kernels.values import Values

Named = dict[str, Any]
"""Tensors, None, or lists and tuples of them, by name."""
Work = Callable[[Named], Named]

PACKED_BYTES = 64 << 20
"""Of a part's gradients of operands: so many are packed, as autograd copies those that it may not keep one by one."""


class Capture(Protocol):
    """The device's own way to do work again."""

    def record(self, work: Callable[[], Named]) -> tuple[Named, Callable[[], object]]:
        """Where ``work`` makes what it makes, and what does the work there; it may not have been done yet."""
        ...

    def unowned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory of ``tensor``, which other recordings may use once nobody else holds the tensor itself."""
        ...


class CudaCapture:
    """CUDA graphs of one device, which take their memory from one pool."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(self, work: Callable[[], Named]) -> tuple[Named, Callable[[], object]]:
        """See ``Capture``. Raises ``RuntimeError`` where ``work`` does what cannot be captured."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _collecting_nothing():
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return made, graph.replay

    def unowned(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Capture``. The graphs keep the pool, and with it the memory."""
        whole = torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Memory:
    """The storage of a tensor as bytes, by its address alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 3,
        }


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """No tensor of somebody else's is freed meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recording:
    """A piece of work, recorded: the memory that it reads, and what it leaves.

    Args:
        capture: the device's.
        work: makes outputs of inputs; it reads nothing else that differs from pass to pass.
        inputs: those of this pass; the work is done for them.
        fixed: addresses that stay what they are: tensors there are read in place. The outputs' are added.
    """

    def __init__(self, capture: Capture, work: Work, inputs: Named, fixed: set[int]) -> None:
        def recorded() -> Named:
            self.slots = self.slots or [_slot(leaf, fixed) for leaf in _leaves(inputs)]
            return work(_filled(inputs, self.slots))

        self.capture, self.lent, self.slots = capture, False, list[Any]()
        self.outputs, self.replay = capture.record(recorded)
        self.addresses = {leaf.data_ptr() for leaf in _leaves(self.outputs) if isinstance(leaf, torch.Tensor)}
        fixed |= self.addresses
        self.play(inputs)

    def play(self, inputs: Named) -> Named:
        """The outputs for ``inputs``, of the form of those recorded; they last until the next call."""
        for slot, leaf in zip(self.slots, _leaves(inputs), strict=True):
            if isinstance(slot, torch.Tensor) and slot.data_ptr() != leaf.data_ptr():
                slot.copy_(leaf)
        self.replay()
        return self.outputs

    def lend(self) -> None:
        """Let recordings of other passes use its memory: nobody needs what this one left any more."""
        if self.lent:
            return
        self.lent = True
        self.slots = [self._unowned(slot) for slot in self.slots]
        self.outputs = _filled(self.outputs, [self._unowned(leaf) for leaf in _leaves(self.outputs)])

    def _unowned(self, leaf: Any) -> Any:
        return self.capture.unowned(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _leaves(named: Named) -> list[Any]:
    found: list[Any] = []
    for value in named.values():
        if isinstance(value, dict):
            found += _leaves(value)
        elif isinstance(value, (list, tuple)):
            found += value
        else:
            found.append(value)
    return found


def _filled(named: Named, slots: Sequence[Any]) -> Named:
    """``named`` with other leaves."""
    rest = iter(slots)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [next(rest) for _ in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return next(rest)

    return fill(named)


def _slot(leaf: Any, fixed: set[int]) -> Any:
    """Where a recording reads what is ``leaf`` now."""
    if not isinstance(leaf, torch.Tensor) or leaf.data_ptr() in fixed:
        return leaf
    # Stages may look at the columns behind a row.
    whole = leaf.new_empty(leaf.untyped_storage().nbytes() // leaf.element_size())
    return whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())


class Part:
    """Steps that follow one another, all of them recorded together or none of them.

    ``reads`` are the values that they look at before they write them, ``sums`` the gradients they look at, ``frees``
    what they let go of.
    """

    def __init__(self, forms: Sequence[Form], steps: Sequence[Step], can: bool) -> None:
        self.steps, self.can = tuple(steps), can
        self.frees = [name for step in steps for name in step.frees]
        self.reads, self.sums, written = dict[str, None](), dict[str, None](), set[str]()
        for stage, is_backward, _ in steps:
            form = forms[stage]
            looked_at = form.needs if is_backward else form.reads
            self.reads |= dict.fromkeys(name for name in looked_at if name not in written)
            if is_backward:
                self.sums |= dict.fromkeys((*form.reads, *form.writes))
            else:
                written |= set(form.writes)
        self.recording: Recording | None = None


class Tape:
    """The recordings of one program, for passes of one shape.

    Args:
        capture: the device's.
        fixed: addresses of what all tapes of these passes have recorded.
    """

    def __init__(self, capture: Capture, fixed: set[int]) -> None:
        self.capture, self.fixed = capture, fixed
        self.marks: list[Any] = []
        self.bound: Sequence[Any] = ()
        self.parts: dict[int, tuple[Any, list[Part]]] = {}
        self.wants: Any = None
        self.playing: weakref.ref[Any] | None = None
        self.broken = ""
        """Why something could not be recorded."""

    def takes(self, frame: Any, bound: Sequence[Any]) -> bool:
        """Whether ``frame``, a call with the stages ``bound``, may play it: nobody else's values are in its memory."""
        if self.broken or (self.playing is not None and self.playing() is not None):
            return False
        marks = marks_of(bound)
        if len(marks) != len(self.marks) or not all(a is b for a, b in zip(marks, self.marks, strict=True)):
            self.clear()
            self.marks, self.bound = marks, bound
        self.playing = weakref.ref(frame)
        return True

    def clear(self) -> None:
        """Let go of all recordings."""
        for recording in self._recordings():
            self.fixed -= recording.addresses
        self.parts, self.wants = {}, None

    def lend(self) -> None:
        """See ``Recording.lend``."""
        for recording in self._recordings():
            recording.lend()

    def _recordings(self) -> list[Recording]:
        every = [part for _, parts in self.parts.values() for part in parts]
        return [part.recording for part in every if part.recording is not None]

    def forward(self, frame: Any, steps: tuple[Step, ...], values: dict[str, Any]) -> None:
        """``frame.run(steps, values)``, played where it can be."""
        for part in self._split(frame, steps):
            if not part.can:
                frame.run(part.steps, values)
                continue
            values.update(self._play(part, partial(_forward, frame, part), {name: values[name] for name in part.reads}))
            for name in part.frees:
                values.pop(name, None)
        # Autograd writes on what a function returns; the recording's own tensor stays as it is.
        values[OUTPUT] = values[OUTPUT].new_empty(0).set_(values[OUTPUT])

    def backward(
        self, frame: Any, steps: tuple[Step, ...], values: Values, grads: dict[str, Any], wants: Any
    ) -> dict[int, Any]:
        """``frame.run_back(steps, values, grads, wants)``, played where it can be."""
        own: dict[int, Any] = {}
        if wants is not self.wants:
            self.parts.pop(id(steps), None)
            self.wants = wants
        for part in self._split(frame, steps):
            if not part.can:
                own |= frame.run_back(part.steps, values, grads, wants)
                continue
            given = {
                "values": {name: values[name] for name in part.reads},
                "grads": {name: grads.pop(name) for name in part.sums if name in grads},
            }
            made = self._play(part, partial(_backward, frame, part, wants), given)
            values.update(made["values"])
            values.let_go(part.frees)
            grads |= made["grads"]
            own |= made["layout"].unpack(made["packed"]) if "layout" in made else made["own"]
        self.playing = None
        return own

    def _play(self, part: Part, work: Work, inputs: Named) -> Named:
        """What ``work`` makes of ``inputs``: recorded at the part's first call, played at the others."""
        if part.recording is not None:
            return part.recording.play(inputs)
        if not self.broken:
            try:
                part.recording = Recording(self.capture, work, inputs, self.fixed)
                return part.recording.outputs
            except RuntimeError as error:
                self.broken = str(error)
        return work(inputs)

    def _split(self, frame: Any, steps: tuple[Step, ...]) -> list[Part]:
        """``steps`` in runs of those that can be recorded and those that cannot."""
        if id(steps) not in self.parts:
            runs: list[tuple[bool, list[Step]]] = []
            for step in steps:
                can = getattr(self.bound[step.stage], "recordable", True)
                if not runs or runs[-1][0] != can:
                    runs.append((can, []))
                runs[-1][1].append(step)
            self.parts[id(steps)] = steps, [Part(frame.program.forms, own, can) for can, own in runs]
        return self.parts[id(steps)][1]


def _forward(frame: Any, part: Part, given: Named) -> Named:
    """The values that a part leaves when it runs on those that are given."""
    values = dict(given)
    frame.run(part.steps, values)
    return {name: value for name, value in values.items() if name not in given}


def _backward(frame: Any, part: Part, wants: Any, given: Named) -> Named:
    """The values, gradients and operands' gradients that a part of backward leaves."""
    values, grads = Values(given["values"], {}), dict(given["grads"])
    own = frame.run_back(part.steps, values, grads, wants)
    new = {name: value for name, value in values.items() if name not in given["values"]}
    if nbytes(own) > PACKED_BYTES:
        return {"values": new, "grads": grads, "own": own}
    layout = Layout(own)
    return {"values": new, "grads": grads, "packed": layout.pack(own), "layout": layout}


def marks_of(bound: Sequence[Any]) -> list[Any]:
    """The objects on which recordings of these stages depend beside their inputs."""
    found: list[Any] = []
    for one in bound:
        found += one.marks() if hasattr(one, "marks") else [operand for operand in one.operands if operand is not None]
    return found
