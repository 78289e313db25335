"""Linears and their adapters, and how a call computes them: all of it but the values of its tensors.

Shapes: K inputs, N outputs, R the ranks of all adapters of a bank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from sloth_kernels.frozen_weight import Weight, Weight4bit

T = TypeVar("T")


class Adapter(NamedTuple):
    """One active adapter of a linear."""

    A_RK: torch.Tensor
    B_NR: torch.Tensor
    scale: float
    dropout: float = 0.0
    """The probability p of its own ``nn.Dropout`` on x; 0 outside training."""


class LoraLinear(NamedTuple):
    """A linear and its active adapters, of which there may be none."""

    weight: Weight
    bias_N: torch.Tensor | None = None
    adapters: Sequence[Adapter] = ()


class Bank(NamedTuple):
    """Adapters that compute in one dtype from one x; their t and u are columns of one matrix each."""

    dtype: torch.dtype
    members: tuple[int, ...]
    ranks: tuple[int, ...]
    """Of the members: what t and u are split into."""
    dropout: float = 0.0
    """Where it is not 0 the bank has one member: each adapter draws a mask of its own."""
    drop_dtype: torch.dtype | None = None
    """What x has when stock's dropout sees it; None for its own."""


class Plan(NamedTuple):
    """Siblings are numbered, and so are the adapters of all of them together. It holds no tensor and may be kept."""

    shapes: tuple[tuple[int, int], ...]
    """N and K of each sibling."""
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    """Of each sibling's product with W, and of its y."""
    sum_dtypes: tuple[torch.dtype, ...]
    """What each sibling's terms are summed in: wide enough for all of them and for y."""
    dx_dtype: torch.dtype
    """Wide enough for every sibling's terms of dx."""
    owners: tuple[int, ...]
    """Each adapter's sibling."""
    own: tuple[tuple[int, ...], ...]
    """Each sibling's adapters."""
    scales: tuple[float, ...]
    banks: tuple[Bank, ...]
    drops: bool
    """Whether any bank has dropout."""
    dtype: torch.dtype | None
    """Of all products and sums, where they share one and the adapters are one bank without dropout; else None."""


class Operands(NamedTuple, Generic[T]):
    """What a call is differentiable in beside x, or something for each of them: one for each sibling in ``weights`` and
    ``biases``, one for each adapter in ``As`` and ``Bs``.

    Of the operands themselves ``weights`` are ``Weight`` objects, of their gradients tensors or None.
    """

    weights: list[T]
    biases: list[T]
    As: list[T]
    Bs: list[T]

    @classmethod
    def of(cls, plan: Plan, flat: Sequence[T]) -> Operands[T]:
        """``flat`` is every weight, then every bias, then every A, then every B."""
        n, m = len(plan.shapes), len(plan.scales)
        return cls(list(flat[:n]), list(flat[n : 2 * n]), list(flat[2 * n : 2 * n + m]), list(flat[2 * n + m :]))


def operands_of(linears: Sequence[LoraLinear]) -> Operands[Any]:
    """The weights and tensors of ``linears``, as ``lora_passes.forward`` takes them."""
    adapters = [adapter for linear in linears for adapter in linear.adapters]
    return Operands(
        [linear.weight for linear in linears],
        [linear.bias_N for linear in linears],
        [adapter.A_RK for adapter in adapters],
        [adapter.B_NR for adapter in adapters],
    )


def needs_of(operands: Operands[Any]) -> Operands[bool]:
    """Which of the operands require a gradient."""
    return Operands(
        [weight.trained is not None for weight in operands.weights],
        [bias is not None and bias.requires_grad for bias in operands.biases],
        [A_RK.requires_grad for A_RK in operands.As],
        [B_NR.requires_grad for B_NR in operands.Bs],
    )


def flattened(operands: Operands[Any]) -> list[torch.Tensor | None]:
    """The operands as the tensors that ``Operands.of`` takes; None for a weight that does not train."""
    return [*(weight.trained for weight in operands.weights), *operands.biases, *operands.As, *operands.Bs]


class Siblings:
    """Linears that share an input under one autocast, with what follows from them for as long as they are the same."""

    __slots__ = ("_plans", "autocast", "drops", "flat", "joins", "linears", "operands")

    def __init__(self, linears: Sequence[LoraLinear], autocast: torch.dtype | None) -> None:
        self.linears, self.autocast = tuple(linears), autocast
        self.operands = operands_of(linears)
        self.flat = flattened(self.operands)
        self.drops = any(adapter.dropout for linear in linears for adapter in linear.adapters)
        # Whether a weight and its adapters can be one product: dropout gives the adapters another x.
        self.joins = not self.drops and all(isinstance(linear.weight, Weight4bit) for linear in linears)
        self._plans: dict[tuple[int, torch.dtype], Plan] = {}

    def are(self, linears: Sequence[LoraLinear], autocast: torch.dtype | None) -> bool:
        """Whether they are these very objects."""
        own = self.linears
        return autocast == self.autocast and len(linears) == len(own) and all(map(operator.is_, linears, own))

    def plan(self, x: torch.Tensor) -> Plan:
        """How to compute them of ``x``; raises what ``plan_of`` does."""
        key = x.shape[-1], x.dtype
        if key not in self._plans:
            self._plans[key] = plan_of(self.linears, x.shape, x.dtype, self.autocast)
        return self._plans[key]


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None where it is off."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Autocast off on x's device; free where it is off already."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def plan_of(
    linears: Sequence[LoraLinear], x_shape: Sequence[int], x_dtype: torch.dtype, autocast: torch.dtype | None
) -> Plan:
    """How to compute ``linears`` of such an x: the same object for calls that differ in their tensors alone.

    Raises ``ValueError`` for shapes that do not fit together, and what ``Weight.dtypes`` raises.
    """
    forms = [
        (
            tuple(weight.shape),
            weight.dtypes(x_dtype, autocast),
            weight.rounds_each and autocast is not None,
            None if bias_N is None else bias_N.shape,
            tuple([(A_RK.shape, B_NR.shape, A_RK.dtype, scale, p) for A_RK, B_NR, scale, p in adapters]),
        )
        for weight, bias_N, adapters in linears
    ]
    return _plan(tuple(forms), x_shape[-1] if x_shape else None, autocast)


@lru_cache(maxsize=4096)
def _plan(forms: tuple[Any, ...], n_in: int | None, autocast: torch.dtype | None) -> Plan:
    for shape, _, _, bias_shape, adapters in forms:
        _check(n_in, shape, bias_shape, adapters)
    owners = tuple(i for i, form in enumerate(forms) for _ in form[4])
    adapters = [adapter for form in forms for adapter in form[4]]
    # Under autocast PEFT's 4-bit layer hands x to the dropout as it is, its dense layer in A's dtype.
    drop_dtypes = [None if forms[i][2] else adapters[j][2] for j, i in enumerate(owners)]
    computed_in = [_adapter_dtype(dtype, autocast) for _, _, dtype, _, _ in adapters]
    own = tuple(tuple(j for j, owner in enumerate(owners) if owner == i) for i in range(len(forms)))
    dtypes, sum_dtypes = [], []
    for i, (_, (product_dtype, y_dtype), _, _, _) in enumerate(forms):
        if own[i] and autocast is not None:
            y_dtype = torch.promote_types(y_dtype, autocast)
        dtypes.append((product_dtype, y_dtype))
        sum_dtypes.append(reduce(torch.promote_types, [computed_in[j] for j in own[i]] + [y_dtype], product_dtype))
    banks, drops = _banks(adapters, computed_in, drop_dtypes), any(adapter[4] for adapter in adapters)
    used = {*computed_in, *sum_dtypes, *(dtype for pair in dtypes for dtype in pair)}
    return Plan(
        shapes=tuple(form[0] for form in forms),
        dtypes=tuple(dtypes),
        sum_dtypes=tuple(sum_dtypes),
        dx_dtype=reduce(torch.promote_types, sum_dtypes),
        owners=owners,
        own=own,
        scales=tuple(adapter[3] for adapter in adapters),
        banks=banks,
        drops=drops,
        dtype=used.pop() if len(used) == 1 and len(banks) <= 1 and not drops else None,
    )


def _adapter_dtype(own: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return own if autocast is None or own == torch.float64 else autocast


def _banks(
    adapters: Sequence[Any], computed_in: Sequence[torch.dtype], drop_dtypes: Sequence[torch.dtype | None]
) -> tuple[Bank, ...]:
    """In the order in which stock draws the masks of those with dropout."""
    members: dict[Any, list[int]] = {}
    for j, (_, _, _, _, p) in enumerate(adapters):
        members.setdefault((computed_in[j], p, j if p else None), []).append(j)
    banks = []
    for (dtype, p, _), js in members.items():
        ranks = tuple(adapters[j][0][0] for j in js)
        banks.append(Bank(dtype, tuple(js), ranks, p, drop_dtypes[js[0]] if p else None))
    return tuple(banks)


def _check(n_in: int | None, shape: tuple[int, ...], bias_shape: Any, adapters: Sequence[Any]) -> None:
    if n_in != shape[1]:
        raise ValueError(f"a weight of shape {shape} needs x of {shape[1]} columns, got {n_in}")
    if bias_shape is not None and bias_shape != (shape[0],):
        raise ValueError(f"a weight of {shape[0]} rows needs a bias ({shape[0]},), got {tuple(bias_shape)}")
    for A_shape, B_shape, _, _, p in adapters:
        if len(A_shape) != 2 or A_shape[1] != shape[1] or B_shape != (shape[0], A_shape[0]):
            raise ValueError(
                f"a weight of shape {shape} needs an adapter of A (r, {shape[1]}) and B ({shape[0]}, r), "
                f"got {tuple(A_shape)} and {tuple(B_shape)}"
            )
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout is a probability between 0 and 1, got {p}")
