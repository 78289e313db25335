"""The numbers rule: |ours - truth| <= |stock in the same dtype - truth| + a stated small tolerance.

The truth is the stock computation on the same values in float64. Both distances are taken as the largest over a tensor
and as its Frobenius norm, for every output and every gradient; the tolerance is relative to the truth's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What a function returned for a call, and the gradients it gave; each with a name for messages."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.outputs.items()
        yield from ((name, grad) for name, grad in self.gradients.items() if grad is not None)


@dataclass(frozen=True)
class Error:
    """Distances of ours and of stock from the truth, relative to the truth's size, in one norm ("max" or "fro")."""

    name: str
    norm: str
    ours: float
    stock: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.ours <= self.stock + self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.norm}): ours is {self.ours:.2e} from the float64 truth, stock {self.stock:.2e}; "
            f"the tolerance is {self.tolerance:.0e}"
        )


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """A function's result as a tuple of tensors."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def inputs_with_gradient(call: Call) -> dict[str, torch.Tensor]:
    """The call's tensors that need a gradient, by position or keyword."""
    args, kwargs = call
    named = {**{f"argument {i}": arg for i, arg in enumerate(args)}, **kwargs}
    return {name: t for name, t in named.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def in_float64(call: Call) -> Call:
    """The call on the same values, strides and gradient flags, with floating tensors in float64."""

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(torch.float64).requires_grad_(value.requires_grad)

    args, kwargs = call
    return tuple(convert(arg) for arg in args), {name: convert(value) for name, value in kwargs.items()}


def random_upstream(fn: Callable[..., Any], call: Call) -> list[torch.Tensor]:
    """A random gradient for each differentiable output of ``fn``, in that output's dtype."""
    args, kwargs = call
    with torch.enable_grad():
        outputs = [output for output in as_tuple(fn(*args, **kwargs)) if output.requires_grad]

    def randn(index: int, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(output.device).manual_seed(index)
        return torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)

    return [randn(i, output) for i, output in enumerate(outputs, start=1)]


def evaluate(fn: Callable[..., Any], call: Call, upstream: Sequence[torch.Tensor]) -> Evaluation:
    """Call ``fn`` and pull ``upstream`` back through its differentiable outputs."""
    args, kwargs = call
    outputs = as_tuple(fn(*args, **kwargs))
    inputs = inputs_with_gradient(call)
    differentiable = [output for output in outputs if output.requires_grad]
    gradients: Sequence[torch.Tensor | None] = ()
    if inputs:
        if len(differentiable) != len(upstream):
            raise AssertionError(f"{len(differentiable)} differentiable outputs, expected {len(upstream)}")
        casts = [grad.to(output.dtype) for grad, output in zip(upstream, differentiable, strict=True)]
        gradients = torch.autograd.grad(differentiable, list(inputs.values()), casts, allow_unused=True)
    return Evaluation(
        {f"output {i}": output.detach() for i, output in enumerate(outputs)},
        {f"gradient of {name}": grad for name, grad in zip(inputs, gradients, strict=True)},
    )


def _distance(a: torch.Tensor, truth: torch.Tensor, norm: str) -> float:
    difference = a.to(torch.float64) - truth.to(torch.float64)
    return (difference.abs().max() if norm == "max" else torch.linalg.vector_norm(difference)).item()


def errors(ours: Evaluation, stock: Evaluation, truth: Evaluation, tolerance: float) -> list[Error]:
    """Each output's and each gradient's errors in both norms, relative to the truth's size in that norm.

    Where the truth is 0, terms have cancelled, each as large as what else came of the call.
    """
    found: list[Error] = []
    stock_tensors, true_tensors = dict(stock.tensors()), dict(truth.tensors())
    for norm in ("max", "fro"):
        sizes = {
            name: _distance(torch.zeros_like(true), true, norm) for name, true in true_tensors.items() if true.numel()
        }
        largest = max(sizes.values(), default=0.0) or 1.0
        for name, tensor in ours.tensors():
            if tensor.numel() == 0:
                continue
            mine, theirs = (_distance(t, true_tensors[name], norm) for t in (tensor, stock_tensors[name]))
            size = sizes[name] or largest
            found.append(Error(name, norm, mine / size, theirs / size, tolerance))
    return found


def assert_same_form(ours: Evaluation, stock: Evaluation) -> None:
    """Outputs and gradients agree in number, shape, dtype and in which of them are None."""
    for part in ("outputs", "gradients"):
        forms = [
            {name: None if t is None else (tuple(t.shape), t.dtype) for name, t in getattr(evaluation, part).items()}
            for evaluation in (ours, stock)
        ]
        assert forms[0] == forms[1], f"{part}: ours {forms[0]}, stock {forms[1]}"


def check(fn: Callable[..., Any], reference: Callable[..., Any], make: Callable[[], Call], tolerance: float) -> None:
    """Assert the numbers rule for ``fn`` against ``reference``; ``make`` returns the same call each time, fresh."""
    upstream = random_upstream(reference, make())
    ours, stock = evaluate(fn, make(), upstream), evaluate(reference, make(), upstream)
    truth = evaluate(reference, in_float64(make()), upstream)
    assert_same_form(ours, stock)
    broken = [str(error) for error in errors(ours, stock, truth, tolerance) if not error.holds]
    assert not broken, "\n".join(broken)
