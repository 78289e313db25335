"""What an Op is: one function with a plain-torch truth, its variants, and the cases that test and time it.

Every file in ``ops/`` ends in ``OP = Op(...)``. Tests, benchmarks and plugins iterate over these, so a new
op needs one new file and nothing else. Tensor names carry their shape as a suffix (``x_TH``: tokens, hidden).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of an op."""


@dataclass(frozen=True)
class Case:
    """One call of an op on fresh random data.

    ``make(dtype, device)`` seeds itself and returns the call's arguments; floating tensors that need a gradient
    have ``requires_grad`` set. Arguments follow the op's signature, so ``op.fn`` and ``op.reference`` both take them.
    """

    name: str
    make: Callable[[torch.dtype, torch.device], Call]


@dataclass(frozen=True)
class Timing:
    """A call to time on a GPU, and the least work it has to do.

    ``bytes_forward`` and ``bytes_backward`` are the fewest bytes of device memory read and written, ``flops`` the
    matrix-product operations of forward and backward together; each is 0 where it does not bound the op.
    """

    case: Case
    bytes_forward: int = 0
    bytes_backward: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Op:
    """A differentiable function that plugins put in place of a model's own computation.

    ``fn`` runs the Triton kernels where ``launch.runs_triton`` allows and ``reference`` elsewhere; both take the
    same arguments and return a tensor or a tuple of tensors. ``variants`` are the values of the ``variant`` argument
    (empty where the op has none). ``cases`` must cover odd and non-power-of-two sizes and strided inputs.
    ``tolerance`` is the stated small term of the numbers rule per dtype, relative to the largest true value.
    ``launches`` says whether ``fn`` launches Triton kernels, ``differentiable`` whether its cases have gradients.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    timings: Callable[[], Sequence[Timing]] = tuple
    variants: tuple[str, ...] = ()
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    )
    launches: bool = True
    differentiable: bool = True
