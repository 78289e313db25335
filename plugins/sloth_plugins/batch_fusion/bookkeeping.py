"""What a host asks of the device between forward and backward, for its books, and does not wait for.

``compute_loss`` of TRL asks for the number of tokens, their entropy and how many were right, with ``.item()`` and
``if count > 0``: each would wait until the device has done all of forward, and only then would backward be launched.
Here ``.item()`` gives a ``Later``, numbers that the host knows are answered by it, and one that it sends to the device
travels with the launch of a kernel, where a copy would wait. At the end of the step plain numbers are in the books.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sloth_kernels.known import know, known
from sloth_plugins.batch_fusion.later import Later, plain

DEVICES = ("cuda",)
"""Types of devices that work while the host goes on."""


@contextmanager
def unhurried(trainer: Any, model: Any) -> Iterator[None]:
    """Wait for no answer from the end of ``model``'s next forward to the end of this context.

    The numbers of several processes are gathered; they are left as they are.
    """
    if trainer.args.device.type not in DEVICES or trainer.accelerator.num_processes > 1:
        yield
        return
    with ExitStack() as stack:

        def forward_has_run(*_: Any) -> None:
            hook.remove()
            stack.enter_context(Unhurried())

        hook = model.register_forward_hook(forward_has_run)
        try:
            yield
        finally:
            hook.remove()


def settle(trainer: Any) -> None:
    """Put plain numbers into ``trainer``'s books; for the last that is still to come, wait."""
    for name, value in list(vars(trainer).items()):
        if type(value) is Later:
            setattr(trainer, name, value.value)
    for books in getattr(trainer, "_metrics", {}).values():
        for entries in books.values() if isinstance(books, Mapping) else (books,):
            _settle_end(entries)


def _settle_end(entries: list[Any]) -> None:
    """Those at the end: they come with each pass, and what precedes them was settled with its step."""
    for i in range(len(entries) - 1, -1, -1):
        if type(entries[i]) is not Later:
            return
        entries[i] = entries[i].value


class Unhurried(TorchFunctionMode):
    """While it is active, ``ANSWERS`` are given in the place of what they are named after."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = plain(args), {name: plain(value) for name, value in (kwargs or {}).items()}
        answer = ANSWERS.get(func)
        return func(*args, **kwargs) if answer is None else answer(func, *args, **kwargs)


def _item(func: Callable[..., Any], tensor: Tensor) -> Any:
    if (number := known(tensor)) is not None:
        return number
    may = tensor.device.type in DEVICES and tensor.numel() == 1 and not (tensor.requires_grad or tensor.is_complex())
    return Later.of(tensor) if may else func(tensor)


def _asked(func: Callable[..., Any], tensor: Tensor) -> Any:
    number = known(tensor)
    return func(tensor) if number is None else CONVERSIONS[func](number)


def _followed(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The device's result, which the host follows where it knows the whole number that it is of."""
    result = func(*args, **options)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    number = known(tensors[0]) if len(tensors) == 1 and tensors[0] is args[0] and not options else None
    if number is not None and not tensors[0].is_floating_point():
        know(result, func(torch.tensor(number, dtype=tensors[0].dtype), *args[1:]).item())
    return result


def _sent(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A new tensor: a number is filled in on the device."""
    device = options.get("device")
    number = len(args) == 1 and type(args[0]) in (int, float, bool) and not options.keys() - {"dtype", "device"}
    if not number or device is None or torch.device(device).type not in DEVICES:
        return func(*args, **options)
    sent = torch.full((), args[0], **options)
    return sent if sent.is_floating_point() else know(sent, func(*args, dtype=sent.dtype).item())


CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: operator.index,
}
FOLLOWED = (Tensor.sum, torch.sum, Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.ne, Tensor.__eq__)
"""Of those the host does what the device does, with a number that it knows."""
ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.item: _item,
    torch.tensor: _sent,
    **dict.fromkeys(CONVERSIONS, _asked),
    **dict.fromkeys(FOLLOWED, _followed),
}
"""By function of torch: what is done instead."""
