"""The loss of a step, whose value came to the host while backward was still to run.

``transformers.Trainer`` asks of every micro-batch's loss whether it is NaN or infinite. On a GPU the answer comes when
everything before it is done, backward too, and only then does the host launch clipping and the optimizer: the GPU waits
for it. Here the value is sent to the host as soon as forward has it, and the question is answered from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ANSWERED = (torch.isnan, torch.isinf)


class KnownLoss(Tensor):
    """A loss on the device that answers ``ANSWERED`` from copies of its terms; a tensor like others in all else.

    Without terms it is zero.
    """

    copies: Sequence[Any]

    @staticmethod
    def __new__(cls, loss: Tensor, copies: Sequence[Any]) -> KnownLoss:
        self = loss.as_subclass(cls)
        self.copies = copies
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in ANSWERED and isinstance(args[0], KnownLoss):
            return func(sum((copy.read() for copy in args[0].copies), torch.zeros(())))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_plain, args), **tree_map(_plain, dict(kwargs or {})))


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, KnownLoss) else value
