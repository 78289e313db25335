"""Every op, in every case and dtype: outputs and gradients by the numbers rule, and kernels that really ran."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from integration_tests import numbers
from sloth_kernels import launch
from sloth_kernels.op import Case, Op
from sloth_kernels.registry import load_ops

OPS = load_ops()
DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
DTYPES = launch.INTERPRETER_DTYPES if launch.interpreting() else launch.TRITON_DTYPES


def _cases(ops: Iterable[Op]) -> Any:
    return [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in ops for case in op.cases()]


CASES = _cases(OPS)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_name)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_numbers(op: Op, case: Case, dtype: torch.dtype, launches: Any) -> None:
    numbers.check(op.fn, op.reference, lambda: case.make(dtype, DEVICE), op.tolerance[dtype])
    assert not op.launches or launches.count > 0, "no kernel ran: the reference was compared with itself"


@pytest.mark.parametrize(("op", "case"), CASES)
def test_cases_are_reproducible(op: Op, case: Case) -> None:
    first, second = (case.make(torch.float32, DEVICE) for _ in range(2))
    flat = [[*args, *kwargs.values()] for args, kwargs in (first, second)]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=_dtype_name)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_without_kernels(op: Op, dtype: torch.dtype, launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel runs, every case still obeys the numbers rule: the CPU path in each dtype."""
    if op.launches:
        monkeypatch.setattr(sys.modules[op.fn.__module__], "runs_triton", lambda *tensors: False)
    for case in op.cases():
        numbers.check(op.fn, op.reference, lambda case=case: case.make(dtype, DEVICE), op.tolerance[dtype])
    assert launches.count == 0


@pytest.mark.parametrize(("op", "case"), _cases(op for op in OPS if op.differentiable))
def test_reference_gradients(op: Op, case: Case) -> None:
    """The truth's own derivatives, by finite differences in float64 along random directions."""
    args, kwargs = numbers.in_float64(case.make(torch.float64, DEVICE))
    inputs = numbers.inputs_with_gradient((args, kwargs))

    def differentiable(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        placed = iter(leaves)
        outputs = op.reference(
            *(next(placed) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args), **kwargs
        )
        return tuple(output for output in numbers.as_tuple(outputs) if output.requires_grad)

    assert torch.autograd.gradcheck(differentiable, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("op", [op for op in OPS if op.variants], ids=lambda op: op.name)
def test_unknown_variant_names_the_valid_ones(op: Op) -> None:
    args, kwargs = op.cases()[0].make(torch.float32, DEVICE)
    with pytest.raises(ValueError, match=op.variants[-1]):
        op.fn(*args, **{**kwargs, "variant": "no such variant"})


@pytest.mark.parametrize("op", [op for op in OPS if op.variants], ids=lambda op: op.name)
def test_every_variant_has_a_case(op: Op) -> None:
    assert {case.make(torch.float32, DEVICE)[1]["variant"] for case in op.cases()} == set(op.variants)
