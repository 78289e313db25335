"""Many tensors and their optimizer states as one launch sees them: lists of addresses that follow what changes.

Gradients are made anew for each step. Their addresses are therefore read at every step, in loops that run in C, and
sent in one copy where one of them changed: from pinned memory, which torch's allocator does not hand out again before
the copy is done, to a new tensor, so that no kernel still reads what is written. The host waits for nothing.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from sloth_kernels.launch import TRITON_DTYPES, cdiv, runs_triton
from sloth_kernels.optimizers import adam

MAX_ELEMENTS = 2**31
"""Elements of a tensor from which bitsandbytes' own counters overflow."""
DTYPE, STEP, FIRST_MOMENT = attrgetter("dtype"), itemgetter("step"), itemgetter("state1")


def refusal(p: Tensor, state: dict[str, Any]) -> str | None:
    """Why ``p``, with its gradient and ``state``, cannot be part of a batch; None if it can."""
    grad = p.grad
    if type(p) not in (Tensor, torch.nn.Parameter) or p.dtype not in TRITON_DTYPES or p.numel() >= MAX_ELEMENTS:
        return f"{type(p).__name__} of {p.dtype} and {p.numel():,} elements"
    if grad is None or grad.dtype != p.dtype or grad.layout != torch.strided:
        return f"gradient of {grad.dtype} and {grad.layout}" if grad is not None else "no gradient"
    if not runs_triton(p):
        return f"no kernel for {p.dtype} on {p.device}"
    if type(state.get("step")) is not int:
        return "its state does not count steps"
    return _state_refusal(p, state)


def _state_refusal(p: Tensor, state: dict[str, Any]) -> str | None:
    blocks = cdiv(p.numel(), adam.BLOCK)
    eight_bit = getattr(state.get("state1"), "dtype", None) == torch.uint8
    moments = (torch.uint8 if eight_bit else torch.float32, p.numel())
    expected = {"state1": moments, "state2": moments}
    if eight_bit:
        expected |= dict.fromkeys(("absmax1", "absmax2"), (torch.float32, blocks))
        expected |= dict.fromkeys(("qmap1", "qmap2"), (torch.float32, 256))
    for name, (dtype, numel) in expected.items():
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.numel() != numel:
            return f"{name} is not {numel:,} elements of {dtype}"
        if tensor.device != p.device or not tensor.is_contiguous():
            return f"{name} is not in one piece on {p.device}"
    return None


def kind(p: Tensor, state: dict[str, Any]) -> tuple[Any, ...]:
    """What tensors of one batch have in common; those for which ``refusal`` is None."""
    return p.dtype, p.device, state["state1"].dtype, state["step"]


class Batch:
    """Tensors of one ``kind``, updated by one launch.

    Args:
        params: contiguous.
        states: their states, in bitsandbytes' names; ``step`` is counted here.
    """

    def __init__(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        self.params, self.states = list(params), list(states)
        self.dtype, device, moments, _ = kind(params[0], states[0])
        self.eight_bit = moments == torch.uint8
        self._fields = itemgetter(*(adam.FIELDS_8BIT if self.eight_bit else adam.FIELDS_32BIT))
        self._held, self._places = self._tensors(), self._addresses()
        self._sizes, self._chunks = _split([p.numel() for p in params], device)
        self._table = _sent([p.data_ptr() for p in params] + [t.data_ptr() for t in self._held], device)
        self._grads, self._sent = self._table, list[int]()

    def stands(self, grads: Sequence[Tensor]) -> bool:
        """Whether ``grads`` fit, steps are still equal, and neither a parameter nor a state is another or has moved.

        That a state's storage was exchanged in place is seen by its first moment's.
        """
        return (
            len(set(map(STEP, self.states))) == 1
            and set(map(DTYPE, grads)) == {self.dtype}
            and all(map(is_, self._tensors(), self._held))
            and self._addresses() == self._places
        )

    def update(self, grads: Sequence[Tensor], lr: float, betas: Sequence[float], eps: float, decay: float) -> None:
        """One step of all of them by ``grads``; launched, not waited for. Ask ``stands`` before."""
        step = self.states[0]["step"] + 1
        for state in self.states:
            state["step"] = step
        if not all(map(Tensor.is_contiguous, grads)):
            grads = self._made_contiguous()
        self._launch(grads, adam.Hyper(lr, betas[0], betas[1], eps, decay, step))

    def _tensors(self) -> list[Tensor]:
        return list(chain.from_iterable(map(self._fields, self.states)))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, chain(self.params, map(FIRST_MOMENT, self.states))))

    def _made_contiguous(self) -> list[Any]:
        """The parameters' gradients, replaced where they are not contiguous, as bitsandbytes does."""
        for p in self.params:
            p.grad = None if p.grad is None else p.grad.contiguous()
        return [p.grad for p in self.params]

    def _launch(self, grads: Sequence[Tensor], hyper: adam.Hyper) -> None:
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses != self._sent:
            self._grads, self._sent = _sent(addresses, self._table.device), addresses
        adam.update(self._table, self._grads, self._sizes, self._chunks, self.dtype, self.eight_bit, hyper)


def _sent(addresses: list[int], device: torch.device) -> Tensor:
    # From a list, torch.tensor takes a hundred times as long.
    return _to_device(torch.frombuffer(array.array("q", addresses), dtype=torch.int64), device)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without a wait."""
    if device.type != "cuda":
        return values
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values).to(device, non_blocking=True)


def _split(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes (T,) int64, and for each chunk (C, 2) int32 its tensor and its place in it."""
    sizes_T = torch.tensor(sizes)
    counts_T = (sizes_T + adam.CHUNK - 1) // adam.CHUNK
    tensor_C = torch.arange(len(sizes)).repeat_interleave(counts_T)
    place_C = torch.arange(len(tensor_C)) - (counts_T.cumsum(0) - counts_T)[tensor_C]
    chunks_C2 = torch.stack((tensor_C, place_C), 1).int()
    return _to_device(sizes_T, device), _to_device(chunks_C2, device)
