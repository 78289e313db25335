"""Dense copies of 4-bit weights, kept where there is memory for them and given up where there is none.

Beside each weight (N, K) lie columns for the adapters of its siblings, so that one product computes both terms:

    [x | t] [W_i | s_i B_i]ᵀ = x W_iᵀ + s_i t_i B_iᵀ        dy_i [W_i | s_i B_i] = [dy_i W_i | u_i]

with 0 in the columns of other siblings' adapters. A product of r more columns costs less than reading y, or dy, again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sloth_kernels.adapters import LoraLinear, Siblings
from sloth_kernels.frozen_weight import Weight
from sloth_kernels.relief import givers

ALIGNMENT = 8
"""Row lengths are multiples of this many elements: 16 bytes, which matrix products load at a time."""


class Joined(NamedTuple):
    """What the products of a group read, all of one dtype."""

    weights: list[torch.Tensor]
    """[W_i | s_i B_i] of each linear."""
    transposed: list[torch.Tensor]
    """Views of them."""
    columns: list[torch.Tensor]
    """Each adapter's s B, views of them too."""
    A_RK: torch.Tensor | None
    """A copy of all As, one below the other; None where one A is all of it."""


class DenseGroup:
    """The dense weights of linears that share an input, each (N, K + columns), while ``keeps`` says so."""

    def __init__(self) -> None:
        self.keeps = False
        self.is_told = False
        """Whether ``expire`` is called whenever adapters may have changed; else they are copied at every call."""
        self._made: Joined | None = None
        self._of: Siblings | None = None
        self._dtype: torch.dtype | None = None
        self._fresh = False

    @classmethod
    def columns(cls, linears: Sequence[LoraLinear]) -> int:
        """How many columns the adapters of ``linears`` take."""
        return cls.columns_for(sum(len(adapter.A_RK) for linear in linears for adapter in linear.adapters))

    @staticmethod
    def columns_for(rank: int) -> int:
        """``rank``, filled up to the alignment."""
        return -(-rank // ALIGNMENT) * ALIGNMENT

    def joined(self, siblings: Siblings, dtype: torch.dtype) -> Joined:
        """Each weight in ``dtype`` with s B in its adapters' columns, as B is now."""
        made = self._made
        if made is None or siblings is not self._of or dtype != self._dtype:
            made = self._made = self._fitted(siblings, dtype)
            self._of, self._dtype, self._fresh = siblings, dtype, False
        if not self._fresh:
            _copy_adapters(siblings, made)
            self._fresh = self.is_told
        return made

    def made(self, siblings: Siblings) -> Joined | None:
        """What ``joined`` returned last, if that was for ``siblings``; None where it has been given up."""
        return self._made if siblings is self._of else None

    def expire(self) -> None:
        """The adapters may have changed: optimizers that write through pointers leave no other sign of it."""
        self._fresh = False

    def empty(self) -> bool:
        """Let go of the matrices; whether there were any."""
        had = self._made is not None
        self._made = self._of = None
        return had

    def _fitted(self, siblings: Siblings, dtype: torch.dtype) -> Joined:
        linears, As = siblings.linears, siblings.operands.As
        n_in, columns = linears[0].weight.shape[1], self.columns(linears)
        weights = self._weights(siblings, dtype, n_in + columns)
        start, own = n_in, []
        for linear, weight in zip(linears, weights, strict=True):
            weight[:, n_in:].zero_()
            for adapter in linear.adapters:
                own.append(weight[:, start : (start := start + len(adapter.A_RK))])
        apart = len(As) > 1 or any(A_RK.dtype != dtype for A_RK in As)
        A_RK = weights[0].new_empty(start - n_in, n_in) if apart else None
        return Joined(weights, [weight.t() for weight in weights], own, A_RK)

    def _weights(self, siblings: Siblings, dtype: torch.dtype, width: int) -> list[torch.Tensor]:
        """Those that are there, where they are of the same linears and as wide; else new ones."""
        if self._made is not None and self._of is not None:
            pairs = zip(siblings.linears, self._of.linears, strict=True)
            there = self._made.weights
            if dtype == self._dtype and there[0].shape[1] == width and all(a.weight is b.weight for a, b in pairs):
                return there
        self.empty()
        return [_with_columns(linear.weight, width, dtype) for linear in siblings.linears]


def _copy_adapters(siblings: Siblings, made: Joined) -> None:
    adapters = (adapter for linear in siblings.linears for adapter in linear.adapters)
    for own, (_, B_NR, scale, _) in zip(made.columns, adapters, strict=True):
        if scale == 1.0:
            own.copy_(B_NR)
        else:
            torch.mul(B_NR, scale, out=own)
    if made.A_RK is not None:
        torch.cat(siblings.operands.As, out=made.A_RK)


def _with_columns(weight: Weight, width: int, dtype: torch.dtype) -> torch.Tensor:
    n_out, n_in = weight.shape
    dense = weight.dense(dtype)
    made = dense.new_empty(n_out, width)
    made[:, :n_in].copy_(dense)
    return made


class DenseCache:
    """The groups of one model's layers, in the order in which they run; the first ``held`` layers keep theirs."""

    def __init__(self, layers: Sequence[Sequence[DenseGroup]]) -> None:
        self.layers = [list(groups) for groups in layers]
        self.held = 0
        self.on_relief: Callable[[], None] | None = None
        """Called when the matrices had to be given up, the device being out of memory."""
        givers.add(self)
        for groups in self.layers:
            for group in groups:
                group.is_told = True

    def expire(self) -> None:
        """A pass begins: adapters may have changed since they were copied."""
        for groups in self.layers:
            for group in groups:
                group.expire()

    def hold(self, count: int) -> None:
        """From now on the first ``count`` layers keep dense matrices, the others none."""
        if count == self.held:
            return
        self.held = count
        for i, groups in enumerate(self.layers):
            for group in groups:
                group.keeps = i < count
                if not group.keeps:
                    group.empty()

    def give_up(self) -> bool:
        """Let go of all matrices and keep none from now on; whether there were any."""
        freed = sum(group.empty() for groups in self.layers for group in groups)
        self.hold(0)
        if freed and self.on_relief is not None:
            self.on_relief()
        return freed > 0
