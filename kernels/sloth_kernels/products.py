"""Matrix products into given results, which may be of another dtype than the operands.

Autocast leaves products in place or with ``out`` alone, so that the callers' dtypes hold whatever is on around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0, *, first: bool = False
) -> None:
    """``total += alpha * left @ right``, for operands of one dtype; the ``first`` overwrites what ``total`` held.

    16-bit operands add to a float32 ``total`` without a rounding between; wider ones than ``total`` round once before.
    """
    beta = 0 if first else 1
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta, alpha=alpha)
    elif total.dtype == torch.float32 and left.dtype.itemsize == 2 and total.is_cuda and torch.version.hip is None:
        mixed: dict[str, Any] = {"out_dtype": torch.float32}
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total, **mixed)
    elif total.dtype == torch.promote_types(total.dtype, left.dtype):
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta, alpha=alpha)
    else:
        rounded = product(left, right, left.dtype, alpha)
        if first:
            total.copy_(rounded)
        else:
            total.add_(rounded)


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, alpha: float = 1.0) -> torch.Tensor:
    """``alpha * left @ right`` in ``dtype``."""
    if alpha == 1.0 and dtype == left.dtype:
        return torch.mm(left, right)
    out = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    add_product(out, left, right, alpha, first=True)
    return out


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., K) as (T, K) with contiguous rows that do not overlap; a copy only where its layout needs one."""
    if x.dim() == 2 and x.is_contiguous():
        return x
    if x.is_contiguous() and x.numel():
        return x.view(-1, x.shape[-1])
    x_TK = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    walkable = x_TK.stride(1) == 1 and x_TK.stride(0) >= x_TK.shape[1]
    return x_TK if walkable else x_TK.contiguous()


def in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; several times cheaper than ``x.to(dtype)`` where that is x itself."""
    return x if x.dtype == dtype else x.to(dtype)


def split(x: torch.Tensor, widths: Sequence[int], dim: int = 1) -> Sequence[torch.Tensor]:
    """Views of the columns of ``x``, or of its rows, side by side."""
    return (x,) if len(widths) == 1 else torch.split_with_sizes(x, widths, dim)


def stacked(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The rows of all ``parts`` in one matrix; a copy only where there are several, or another dtype."""
    return in_dtype(parts[0] if len(parts) == 1 else torch.cat(list(parts)), dtype)


class Casts:
    """One tensor in each dtype it is wanted in, each made once."""

    __slots__ = ("made", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.made = {tensor.dtype: tensor}

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in ``dtype``."""
        if dtype not in self.made:
            self.made[dtype] = self.tensor.to(dtype)
        return self.made[dtype]
