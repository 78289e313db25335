"""4-bit weights that share an input, made dense with columns for their adapters: one product computes both terms.

    [x | t] [W_i | s_i B_i]ᵀ = x W_iᵀ + s_i t_i B_iᵀ        dy_i [W_i | s_i B_i] = [dy_i W_i | u_i]

with 0 in the columns of other siblings' adapters. A product of r more columns costs less than reading y, or dy, again.
And it rounds once: cuBLAS rounds what it has multiplied before it adds what it was given to add to, so that of an
adapter's term that is small beside y, as after its first update, three quarters would be lost.

Shapes: T tokens, K inputs, N outputs of a linear, R the ranks of all adapters together, width = K + R rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sloth_kernels.adapters import Adapter, LoraLinear, Siblings
from sloth_kernels.gradients import Leading
from sloth_kernels.products import rows

ALIGNMENT = 8
"""Row lengths are multiples of this many elements: 16 bytes, which matrix products load at a time."""


class Joined(Protocol):
    """What the products of a group read, all of one dtype."""

    @property
    def width(self) -> int:
        """Columns of each matrix."""
        ...

    @property
    def A_RK(self) -> torch.Tensor | None:
        """All As, one below the other; None where there are no adapters."""
        ...

    @property
    def block(self) -> torch.Tensor | None:
        """All matrices, one below the other; None where they are not there at once."""
        ...

    def matrix(self, i: int) -> torch.Tensor:
        """[W_i | s_i B_i] (N, width), for one product: nobody keeps it for longer."""
        ...


class Kept(NamedTuple):
    """Matrices that stay."""

    width: int
    block: torch.Tensor
    weights: Sequence[torch.Tensor]
    """[W_i | s_i B_i] of each linear, views of the block."""
    columns: list[torch.Tensor]
    """Each adapter's s B, views of them."""
    A_RK: torch.Tensor | None
    """A itself where one A is all of it, else a copy."""

    @classmethod
    def of(cls, siblings: Siblings, block: torch.Tensor) -> Kept:
        """With the weights in ``block``; the columns are still to be filled by ``fill``."""
        linears, As, n_in = siblings.linears, siblings.operands.As, siblings.linears[0].weight.shape[1]
        weights = block.split([linear.weight.shape[0] for linear in linears])
        block[:, n_in:].zero_()
        first, columns = n_in, list[torch.Tensor]()
        for linear, weight in zip(linears, weights, strict=True):
            columns += _own_columns(weight, first, linear.adapters)
            first += rank_of([linear])
        copies = len(As) > 1 or any(A_RK.dtype != block.dtype for A_RK in As)
        A_RK = block.new_empty(first - n_in, n_in) if copies else As[0] if As else None
        return cls(block.shape[1], block, weights, columns, A_RK)

    def matrix(self, i: int) -> torch.Tensor:
        """The one that is kept."""
        return self.weights[i]

    def fill(self, siblings: Siblings) -> None:
        """Copy the adapters as they are now."""
        _copy_scaled(self.columns, [adapter for linear in siblings.linears for adapter in linear.adapters])
        if self.A_RK is not None and self.A_RK is not siblings.operands.As[0]:
            torch.cat(siblings.operands.As, out=self.A_RK)


class Made:
    """Matrices that are made anew for each product, one at a time."""

    block = None

    def __init__(self, siblings: Siblings, dtype: torch.dtype) -> None:
        self.siblings, self.dtype = siblings, dtype
        self.n_in = siblings.linears[0].weight.shape[1]
        self.width = self.n_in + columns_of(siblings.linears)
        self._A_RK: torch.Tensor | None = None

    @property
    def A_RK(self) -> torch.Tensor | None:
        """A copy, or A itself where one A is all of it."""
        As = self.siblings.operands.As
        if self._A_RK is None and As:
            self._A_RK = (As[0] if len(As) == 1 else torch.cat(As)).to(self.dtype)
        return self._A_RK

    def matrix(self, i: int) -> torch.Tensor:
        """A new one."""
        linears = self.siblings.linears
        made = block_of(linears[i : i + 1], self.width, self.dtype)
        if rank_of(linears[i : i + 1]) < self.width - self.n_in:
            made[:, self.n_in :].zero_()
        adapters = linears[i].adapters
        _copy_scaled(_own_columns(made, self.n_in + rank_of(linears[:i]), adapters), adapters)
        return made


def rank_of(linears: Sequence[LoraLinear]) -> int:
    """Of all their adapters together."""
    return sum(len(adapter.A_RK) for linear in linears for adapter in linear.adapters)


def columns_of(linears: Sequence[LoraLinear]) -> int:
    """How many columns the adapters of ``linears`` take."""
    return columns_for(rank_of(linears))


def columns_for(rank: int) -> int:
    """``rank``, filled up to the alignment."""
    return -(-rank // ALIGNMENT) * ALIGNMENT


def block_of(linears: Sequence[LoraLinear], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Their 4-bit weights in ``dtype``, one below the other, with columns behind them that hold nothing yet."""
    weights: list[Any] = [linear.weight for linear in linears]
    counts, n_in = [weight.shape[0] for weight in weights], weights[0].shape[1]
    block = torch.empty(sum(counts), width, dtype=dtype, device=weights[0].device)
    for weight, part in zip(weights, block.split(counts), strict=True):
        weight.write(part[:, :n_in])
    return block


def _own_columns(matrix: torch.Tensor, first: int, adapters: Sequence[Adapter]) -> list[torch.Tensor]:
    """The columns of ``matrix`` that are for each of ``adapters``, from ``first`` on."""
    own = []
    for adapter in adapters:
        own.append(matrix.narrow(1, first, len(adapter.A_RK)))
        first += len(adapter.A_RK)
    return own


def _copy_scaled(columns: Sequence[torch.Tensor], adapters: Sequence[Adapter]) -> None:
    for own, (_, B_NR, scale, _) in zip(columns, adapters, strict=True):
        if scale == 1.0:
            own.copy_(B_NR)
        else:
            torch.mul(B_NR, scale, out=own)


# Products -----------------------------------------------------------------------------------------------------------


def beside(x_TK: torch.Tensor, t_TR: torch.Tensor, width: int) -> torch.Tensor:
    """[x | t | 0] (T, width): in the columns that were left free behind x, or in a copy."""
    n_in, rank = x_TK.shape[1], t_TR.shape[1]
    if n_in == width:
        return x_TK
    rest = width - n_in - rank
    if x_TK.stride() != (width, 1):
        return torch.cat([x_TK, t_TR, *([x_TK.new_zeros(len(x_TK), rest)] if rest else ())], 1)
    joined = x_TK.as_strided((x_TK.shape[0], width), (width, 1))
    _, own_TR, free = joined.split_with_sizes((n_in, rank, rest), 1)
    own_TR.copy_(t_TR)
    if rest:
        free.zero_()
    return joined


def forward_one(
    joined_x: torch.Tensor, made: Joined, i: int, bias_N: torch.Tensor | None, addend_TN: torch.Tensor | None
) -> torch.Tensor:
    """y_i (T, N) of [x | t], with its bias or ``addend_TN``, which a product adds for free."""
    first = bias_N if addend_TN is None else addend_TN
    if first is None:
        return torch.mm(joined_x, made.matrix(i).t())
    return torch.addmm(first, joined_x, made.matrix(i).t())


def backward_both(
    dys: Sequence[torch.Tensor], made: Joined, n_in: int, rank: int, first: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx without the adapters' terms (T, K), and u (T, R), side by side in one matrix.

    ``first`` is what the first of ``dys`` came as: where it is ``Leading``, all of them are one product.
    """
    whole_TN = None if made.block is None else _side_by_side(dys, first)
    if made.block is not None and whole_TN is not None:
        total = torch.mm(whole_TN, made.block)
    else:
        total = torch.mm(dys[0], made.matrix(0))
        for i, dy in enumerate(dys[1:], 1):
            total.addmm_(dy, made.matrix(i))
    dx_TK, u_TR, _ = total.split_with_sizes((n_in, rank, made.width - n_in - rank), 1)
    return dx_TK, u_TR


def _side_by_side(dys: Sequence[torch.Tensor], first: Any) -> torch.Tensor | None:
    """All of ``dys`` in one matrix (T, sum of N), where all but the last lie there, and it has room for that one."""
    if not isinstance(first, Leading) or first.whole.dtype != dys[0].dtype:
        return None
    whole_TN, counts = rows(first.whole), [dy.shape[1] for dy in dys]
    if whole_TN.shape[1] != sum(counts):
        return None
    parts = whole_TN.split(counts, 1)
    if any(dy.data_ptr() != part.data_ptr() for dy, part in zip(dys[:-1], parts, strict=False)):
        return None
    parts[-1].copy_(dys[-1])
    return whole_TN


def backward_apart(
    dys: Sequence[torch.Tensor], made: Joined, n_in: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, each in memory of its own."""
    dx_TK, u_TR = (dys[0].new_empty(len(dys[0]), count) for count in (n_in, rank))
    for i, dy in enumerate(dys):
        _add_apart(dx_TK, u_TR, dy, made.matrix(i), beta=min(i, 1))
    return dx_TK, u_TR


def _add_apart(dx_TK: torch.Tensor, u_TR: torch.Tensor, dy: torch.Tensor, matrix: torch.Tensor, beta: int) -> None:
    n_in, rank = dx_TK.shape[1], u_TR.shape[1]
    dx_TK.addmm_(dy, matrix[:, :n_in], beta=beta)
    if rank:
        u_TR.addmm_(dy, matrix[:, n_in : n_in + rank], beta=beta)
