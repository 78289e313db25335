"""Gradients on their way to stages that know more to do with them than to read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch


class LowRankSum(NamedTuple):
    """A gradient ``dy + u A`` that is not summed yet: dy (T, K), u (T, R), A (R, K)."""

    dy_TK: torch.Tensor
    u_TR: torch.Tensor
    A_RK: torch.Tensor
    dA_RK: torch.Tensor | None = None
    """The gradient of A, where whoever takes the sum has still to fill it with uᵀ x."""

    def sum(self) -> torch.Tensor:
        """The gradient (T, K)."""
        return torch.addmm(self.dy_TK, self.u_TR, self.A_RK) if self.u_TR.shape[1] else self.dy_TK


class SumTaker(Protocol):
    """A stage that takes a ``LowRankSum`` for the gradient of what it writes."""

    def fills(self, values: Mapping[str, Any], u_TR: torch.Tensor) -> bool:
        """Whether it would fill ``dA_RK`` in its backward, if that ran next, with these ``values``."""
        ...


class Contracted(NamedTuple):
    """A gradient dy (..., N) with a product that the adapters of its linear need of it."""

    dy: torch.Tensor
    product_NR: torch.Tensor
    """dyᵀ t, of some columns of t, in float32 and without the adapters' scales."""
    first: int
    """Which column of t the product begins with."""

    def columns(self, first: int, count: int) -> torch.Tensor | None:
        """dyᵀ t (N, count) of the columns of t from ``first``; None where it is of others."""
        start = first - self.first
        there = start >= 0 and start + count <= self.product_NR.shape[1]
        return self.product_NR.narrow(1, start, count) if there else None


class Leading(NamedTuple):
    """A gradient dy (..., N) in the first columns of a wider matrix, whose last ones are free for others to fill."""

    dy: torch.Tensor
    whole: torch.Tensor
    """(..., N + M): dy, what the same stage returned next, and free columns."""


def plain(dy: Any) -> Any:
    """The gradient alone."""
    return dy.dy if isinstance(dy, (Contracted, Leading)) else dy
