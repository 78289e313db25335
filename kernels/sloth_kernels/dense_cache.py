"""Dense copies of 4-bit weights, kept where there is memory for them and given up where there is none.

Beside each weight (N, K) lie columns for the adapters of its siblings, so that one product computes both terms:

    [x | t] [W_i | s_i B_i]ᵀ = x W_iᵀ + s_i t_i B_iᵀ        dy_i [W_i | s_i B_i] = [dy_i W_i | u_i]

with 0 in the columns of other siblings' adapters. A product of r more columns costs less than reading y, or dy, again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sloth_kernels.adapters import LoraLinear
from sloth_kernels.frozen_weight import Weight
from sloth_kernels.relief import givers

ALIGNMENT = 8
"""Row lengths are multiples of this many elements: 16 bytes, which matrix products load at a time."""


class DenseGroup:
    """The dense weights of linears that share an input, each (N, K + columns), while ``keeps`` says so."""

    def __init__(self) -> None:
        self.keeps = False
        self._made: list[torch.Tensor] = []
        self._of: list[Weight] = []

    @staticmethod
    def columns(linears: Sequence[LoraLinear]) -> int:
        """How many columns the adapters of ``linears`` take, filled up to the alignment."""
        ranks = sum(len(adapter.A_RK) for linear in linears for adapter in linear.adapters)
        return -(-ranks // ALIGNMENT) * ALIGNMENT

    def weights(self, linears: Sequence[LoraLinear], dtype: torch.dtype) -> list[torch.Tensor]:
        """Each weight in ``dtype`` with s B in its adapters' columns, as B is now.

        B is copied at every call: optimizers that write through pointers leave no sign that it changed.
        """
        width = linears[0].weight.shape[1]
        columns = self.columns(linears)
        of = [linear.weight for linear in linears]
        fits = self._made and self._made[0].dtype == dtype and self._made[0].shape[1] == width + columns
        if not fits or any(a is not b for a, b in zip(of, self._of, strict=True)):
            self.empty()
            self._made = [_with_columns(weight, columns, dtype) for weight in of]
            self._of = of
        start = width
        for linear, made in zip(linears, self._made, strict=True):
            for _, B_NR, scale, _ in linear.adapters:
                own = made[:, start : start + B_NR.shape[1]]
                start += B_NR.shape[1]
                if scale == 1.0:
                    own.copy_(B_NR)
                else:
                    torch.mul(B_NR, scale, out=own)
        return self._made

    def made(self) -> list[torch.Tensor]:
        """What ``weights`` returned last; empty where it has been given up."""
        return self._made

    def empty(self) -> bool:
        """Let go of the matrices; whether there were any."""
        had = bool(self._made)
        self._made, self._of = [], []
        return had


def _with_columns(weight: Weight, columns: int, dtype: torch.dtype) -> torch.Tensor:
    n_out, n_in = weight.shape
    dense = weight.dense(dtype)
    made = dense.new_empty(n_out, n_in + columns)
    made[:, n_in:].zero_()
    made[:, :n_in].copy_(dense)
    return made


class DenseCache:
    """The groups of one model's layers, in the order in which they run; the first ``held`` layers keep theirs."""

    def __init__(self, layers: Sequence[Sequence[DenseGroup]]) -> None:
        self.layers = [list(groups) for groups in layers]
        self.held = 0
        givers.add(self)

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
        return freed > 0
