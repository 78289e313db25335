"""Micro-batches that each count as their mean, however they pass.

Where a model takes no ``num_items_in_batch`` the host asks for the mean over each micro-batch's trained tokens, and
divides it by the number of micro-batches: a token weighs more where its micro-batch trains few. A pass asks the
model's own loss once for each micro-batch that it has tokens of, on that part of the logits, with the trained tokens
of the whole micro-batch as the number to divide by: the sum over passes is the sum of the means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sloth_backend.findings import Edits
from sloth_plugins.batch_fusion.rows import Share
from sloth_plugins.kernel_patching.lazy_logits import LazyLogits


class Means:
    """The loss function of a model whose passes are of several micro-batches."""

    def __init__(self) -> None:
        self._shares: Sequence[Share] | None = None
        self._asked = False

    def install(self, model: Any, edits: Edits) -> None:
        """Stand in front of the model's own loss function, whoever's it is."""
        edits.set(model, "_loss_function", self._around(model.loss_function))

    @contextmanager
    def of(self, shares: Sequence[Share]) -> Iterator[None]:
        """While a pass of ``shares`` runs.

        Raises:
            RuntimeError: the model has not asked for its loss, so that its gradients are not the host's.
        """
        self._shares, self._asked = shares, False
        try:
            yield
            if not self._asked:
                raise RuntimeError(
                    "the model computed its loss without self.loss_function, so the micro-batches of a pass could not "
                    "be told apart; switch passing them together off with accumulation='host'"
                )
        finally:
            self._shares = None

    def _around(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def loss_function(logits: torch.Tensor, labels: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._shares is None:
                return original(logits, labels, *args, **kwargs)
            self._asked = True
            losses, pieces, begin = [], [], 0
            for tokens, trained in self._shares:
                part = slice(begin, begin := begin + tokens)
                pieces.append(_part(logits, part))
                # Each part begins with a row, whose first label is ignored: none is lost at its end.
                options = {**kwargs, "num_items_in_batch": trained}
                losses.append(original(pieces[-1], labels[:, part], *args, **options))
            _add_statistics(logits, pieces)
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

        return loss_function


def _part(logits: torch.Tensor, part: slice) -> torch.Tensor:
    """Logits (1, T, V) of some tokens; those that were put off stay so."""
    if not isinstance(logits, LazyLogits):
        return logits[:, part]
    product = replace(logits.product, hidden=logits.product.hidden[:, part])
    return LazyLogits(product, logits.dtype, logits.epilogue, logits.steps)


def _add_statistics(logits: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Have the statistics of all parts at the whole, where a fused loss has taken any."""
    if isinstance(logits, LazyLogits):
        sums = [piece.product.sums for piece in pieces if isinstance(piece, LazyLogits)]
        if all(one is not None for one in sums):
            logits.product.sums = type(sums[0])(*(torch.stack(terms).sum() for terms in zip(*sums, strict=True)))
