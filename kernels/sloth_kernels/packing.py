"""Many small tensors in one piece of memory for each dtype, so that one launch copies all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

Gradients = Mapping[int, Sequence["torch.Tensor | None"]]
"""Of the operands of each stage."""


class Layout:
    """Where gradients lie in the pieces that ``pack`` makes: shapes and dtypes of those it was made for."""

    def __init__(self, gradients: Gradients) -> None:
        self.forms = {
            stage: [None if g is None else (g.dtype, g.shape) for g in some] for stage, some in gradients.items()
        }
        self.dtypes = list(dict.fromkeys(g.dtype for g in _present(gradients)))

    def pack(self, gradients: Gradients) -> list[torch.Tensor]:
        """One tensor for each dtype."""
        every = list(_present(gradients))
        return [torch.cat([g.reshape(-1) for g in every if g.dtype == dtype]) for dtype in self.dtypes]

    def unpack(self, pieces: Sequence[torch.Tensor]) -> dict[int, list[torch.Tensor | None]]:
        """The gradients in memory of their own: views of a copy of each piece."""
        forms = [form for some in self.forms.values() for form in some if form is not None]
        parts = {}
        for dtype, piece in zip(self.dtypes, pieces, strict=True):
            sizes = [math.prod(shape) for own, shape in forms if own == dtype]
            parts[dtype] = iter(piece.clone().split_with_sizes(sizes))
        return {
            stage: [None if form is None else next(parts[form[0]]).view(form[1]) for form in some]
            for stage, some in self.forms.items()
        }


def _present(gradients: Gradients) -> Iterable[torch.Tensor]:
    return (g for some in gradients.values() for g in some if g is not None)


def nbytes(gradients: Gradients) -> int:
    """Of all of them."""
    return sum(g.nbytes for g in _present(gradients))
