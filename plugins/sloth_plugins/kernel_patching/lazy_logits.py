"""Logits that are not computed until somebody looks at them.

``lm_head`` returns a LazyLogits: a tensor with shape, dtype and device but no storage. Scales, softcaps and casts
that a model applies to it are recorded; the loss takes hidden states, weight and record to a fused op; every other
use computes the logits then and there, through the head's own forward, with gradients where they are enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_quantized", "is_sparse"),
        # DDP asks which outputs have a gradient function, and leaves those without one as they are.
        *("grad_fn", "is_leaf"),
    )
} | {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__),
    # FSDP2 asks which outputs to cast.
    *(torch.Tensor.is_floating_point, torch.is_floating_point),
}
"""What can be answered without the numbers."""

SCALINGS: dict[Callable[..., Any], Callable[[float], float]] = {
    torch.Tensor.mul: lambda c: c,
    torch.Tensor.__mul__: lambda c: c,
    torch.Tensor.__rmul__: lambda c: c,
    torch.mul: lambda c: c,
    torch.Tensor.div: lambda c: 1.0 / c,
    torch.Tensor.__truediv__: lambda c: 1.0 / c,
    torch.div: lambda c: 1.0 / c,
    torch.true_divide: lambda c: 1.0 / c,
}
TANH = (torch.tanh, torch.Tensor.tanh)
FLOAT = (torch.Tensor.float,)
COPIES = (torch.clone, torch.Tensor.clone)


@dataclass(frozen=True)
class Epilogue:
    """What happens to ``h @ W.T + b``: ``post * tanh(scale * x)`` where ``tanh``, else ``scale * x``."""

    scale: float = 1.0
    tanh: bool = False
    post: float = 1.0

    def scaled(self, factor: float) -> Epilogue:
        """Followed by a multiplication."""
        if self.tanh:
            return Epilogue(self.scale, True, self.post * factor)
        return Epilogue(self.scale * factor)

    @property
    def softcap(self) -> float | None:
        """The c of ``c * tanh(s * x / c)``; None without a tanh."""
        return self.post if self.tanh else None

    @property
    def logit_scale(self) -> float:
        """The s of ``c * tanh(s * x / c)``, or of ``s * x``."""
        return self.scale * self.post if self.tanh else self.scale


def replaces_rows(head: Any) -> bool:
    """Whether PEFT trains some rows of ``head`` by themselves (``trainable_token_indices``)."""
    return hasattr(head, "trainable_tokens_delta")


@dataclass
class Product:
    """The product that was put off: ``head`` applied to ``hidden`` (..., H), and what came of it.

    ``head`` is an ``nn.Linear``, or what PEFT puts around one to train some of its rows by themselves.
    ``sums`` is set by the loss: the LossSums of ``linear_cross_entropy``. ``differentiable``: whether gradients were
    enabled when the head was called; without them its logits have none, whenever they are looked at.
    """

    head: Any
    forward: Callable[[torch.Tensor], torch.Tensor]
    hidden: torch.Tensor
    autocast: torch.dtype | None
    sums: Any = None
    differentiable: bool = field(default_factory=torch.is_grad_enabled)

    def weight(self) -> torch.Tensor:
        """The matrix (V, H) that the product is with; with rows of their own, one that is made anew at each call."""
        return self.head.get_merged_weights(self.head.active_adapters) if replaces_rows(self.head) else self.head.weight

    def compute(self) -> torch.Tensor:
        """The plain logits, under the autocast that was active when the head was called."""
        if type(self.head.weight).__name__ == "DTensor":
            # Gathering it here would wait for ranks that may never look at their logits.
            raise RuntimeError(
                "these logits were put off, and lm_head's weight has been sharded again since: look at them inside the "
                "model's forward, or leave 'linear_cross_entropy' out of the backend's kernels to have them at once"
            )
        kind = self.hidden.device.type
        gradients = torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled())
        with gradients, torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            return self.forward(self.hidden)


class LazyLogits(torch.Tensor):
    """See the module's docstring. Attributes: ``product``, ``epilogue`` and the ``steps`` that led to it."""

    product: Product
    epilogue: Epilogue
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    _computed: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        product: Product,
        dtype: torch.dtype,
        epilogue: Epilogue | None = None,
        steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (),
    ) -> LazyLogits:
        shape = (*product.hidden.shape[:-1], product.head.out_features)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=product.hidden.device)
        self.product, self.epilogue, self.steps, self._computed = product, epilogue or Epilogue(), steps, None
        return self

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor, kept for the next use unless that needs a gradient and this has none."""
        if not self.is_computed():
            logits = self.product.compute()
            for step in self.steps:
                logits = step(logits)
            self._computed = logits
        assert self._computed is not None
        return self._computed

    def is_computed(self) -> bool:
        """Whether the logits are there, with a gradient where one is enabled."""
        wanted = self.product.differentiable and torch.is_grad_enabled()
        return self._computed is not None and (self._computed.requires_grad or not wanted)

    def then(self, step: Callable[[torch.Tensor], torch.Tensor], epilogue: Epilogue, dtype: torch.dtype) -> LazyLogits:
        """These logits after one more recorded step."""
        return LazyLogits(self.product, dtype, epilogue, (*self.steps, step))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        recorded = _record(func, args, kwargs)
        if recorded is not None:
            return recorded
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


def _record(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    """The lazy result of a scaling, tanh, upcast or copy; None for everything else."""
    lazy = args[0] if args else None
    if not isinstance(lazy, LazyLogits) or kwargs or lazy.is_computed():
        return None
    if func in FLOAT:
        return lazy.then(torch.Tensor.float, lazy.epilogue, torch.float32)
    if func is torch.Tensor.to and len(args) == 2 and _keeps_the_loss(lazy, args[1]):
        dtype = args[1]
        return lazy.then(lambda x: x.to(dtype), lazy.epilogue, dtype)
    if func in COPIES:
        return lazy.then(torch.clone, lazy.epilogue, lazy.dtype)
    if func in TANH and not lazy.epilogue.tanh:
        return lazy.then(torch.tanh, Epilogue(lazy.epilogue.scale, True), lazy.dtype)
    if func in SCALINGS and len(args) == 2:
        factor = args[1]
        if isinstance(factor, (int, float)) and factor:
            step = lambda x: func(x, factor)
            return lazy.then(step, lazy.epilogue.scaled(SCALINGS[func](float(factor))), lazy.dtype)
    return None


def _keeps_the_loss(lazy: LazyLogits, dtype: object) -> bool:
    """Whether a cast leaves the loss as it is: one that loses nothing, or, as FSDP2's of outputs, comes after it."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return False
    return torch.promote_types(lazy.dtype, dtype) == dtype or lazy.product.sums is not None
