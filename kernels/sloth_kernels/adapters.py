"""Adapters of frozen linears, and how a call computes them: all of it but the values of its tensors.

Shapes: K inputs, N outputs, R the ranks of all adapters of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from sloth_kernels.frozen_weight import Weight

T = TypeVar("T")


class Adapter(NamedTuple):
    """One active adapter of a linear."""

    A_RK: torch.Tensor
    B_NR: torch.Tensor
    scale: float


class LoraLinear(NamedTuple):
    """A frozen linear and its active adapters, of which there may be none."""

    weight: Weight
    bias_N: torch.Tensor | None = None
    adapters: Sequence[Adapter] = ()


class Bank(NamedTuple):
    """Adapters that compute in one dtype; their ranks are columns of one t and one u."""

    dtype: torch.dtype
    members: list[int]
    columns: list[slice]


class Plan(NamedTuple):
    """Siblings are numbered, and so are the adapters of all of them together."""

    weights: list[Weight]
    dtypes: list[tuple[torch.dtype, torch.dtype]]
    """Of each sibling's frozen product, and of its y."""
    sum_dtypes: list[torch.dtype]
    """What each sibling's terms are summed in: wide enough for all of them and for y."""
    owners: list[int]
    """Each adapter's sibling."""
    scales: list[float]
    banks: list[Bank]


class Operands(NamedTuple, Generic[T]):
    """The tensors beside x that a call is differentiable in, or something for each of them."""

    biases: list[T]
    As: list[T]
    Bs: list[T]

    @classmethod
    def of(cls, plan: Plan, flat: Sequence[T]) -> Operands[T]:
        """``flat`` is every bias, then every A, then every B."""
        n, m = len(plan.weights), len(plan.scales)
        return cls(list(flat[:n]), list(flat[n : n + m]), list(flat[n + m :]))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None where it is off."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def plan_of(
    linears: Sequence[LoraLinear], x_shape: Sequence[int], x_dtype: torch.dtype, autocast: torch.dtype | None
) -> Plan:
    """How to compute ``linears`` of such an x. Raises ``ValueError`` for shapes that do not fit together."""
    plan = Plan([], [], [], [], [], [])
    banks: dict[torch.dtype, Bank] = {}
    for i, linear in enumerate(linears):
        _check(x_shape, linear)
        product_dtype, y_dtype = linear.weight.dtypes(x_dtype, autocast)
        if linear.adapters and autocast is not None:
            y_dtype = torch.promote_types(y_dtype, autocast)
        sum_dtype = torch.promote_types(product_dtype, y_dtype)
        for A_RK, _, scale in linear.adapters:
            dtype = A_RK.dtype if autocast is None or A_RK.dtype == torch.float64 else autocast
            sum_dtype = torch.promote_types(sum_dtype, dtype)
            bank = banks.setdefault(dtype, Bank(dtype, [], []))
            start = bank.columns[-1].stop if bank.columns else 0
            bank.members.append(len(plan.owners))
            bank.columns.append(slice(start, start + len(A_RK)))
            plan.owners.append(i)
            plan.scales.append(scale)
        plan.weights.append(linear.weight)
        plan.dtypes.append((product_dtype, y_dtype))
        plan.sum_dtypes.append(sum_dtype)
    plan.banks.extend(banks.values())
    return plan


def _check(x_shape: Sequence[int], linear: LoraLinear) -> None:
    n_out, n_in = linear.weight.shape
    if not x_shape or x_shape[-1] != n_in:
        raise ValueError(f"a weight of shape {(n_out, n_in)} needs x of {n_in} columns, got shape {tuple(x_shape)}")
    if linear.bias_N is not None and linear.bias_N.shape != (n_out,):
        raise ValueError(f"a weight of {n_out} rows needs a bias ({n_out},), got {tuple(linear.bias_N.shape)}")
    for A_RK, B_NR, _ in linear.adapters:
        if A_RK.dim() != 2 or A_RK.shape[1] != n_in or B_NR.shape != (n_out, len(A_RK)):
            raise ValueError(
                f"a weight of shape {(n_out, n_in)} needs an adapter of A (r, {n_in}) and B ({n_out}, r), "
                f"got {tuple(A_RK.shape)} and {tuple(B_NR.shape)}"
            )


def flattened(linears: Sequence[LoraLinear]) -> list[torch.Tensor | None]:
    """The operands of ``linears`` as ``Operands.of`` takes them."""
    adapters = [adapter for linear in linears for adapter in linear.adapters]
    return [*(linear.bias_N for linear in linears), *(a.A_RK for a in adapters), *(a.B_NR for a in adapters)]
