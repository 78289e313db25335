"""Batches as rows without padding, and rows laid end to end as one batch. Everything stays on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth_plugins.layer_programs.layouts import BOUNDARIES

IGNORED = -100
"""A label that no loss counts."""
USED = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})

LEAKS = (
    "its position_ids start anew within a row, but it carries an attention_mask too, with which the model's attention "
    "does not keep the documents of a row apart"
)
"""Both sdpa and eager of transformers look for documents in positions only where there is no mask (masking_utils)."""


class UnfitError(Exception):
    """A batch that cannot be taken apart into rows; the message says why."""


class Share(NamedTuple):
    """The next ``tokens``, of a batch in which ``trained`` have a label."""

    tokens: int
    trained: int


@dataclass(frozen=True)
class Rows:
    """Rows laid end to end.

    Attributes:
        input_ids: (T,).
        labels: (T,), each the token's own; ``IGNORED`` where a row of a batch begins, as nothing comes before it.
        lengths: of the documents: a row of a packed batch holds several. Their sum is T.
        padded: the tokens of the batch that they are from, padding included.
        shares: for each batch that they are from, its tokens here and the trained ones of all of it; as long as T.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    padded: int
    shares: tuple[Share, ...] = ()

    @cached_property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def ends(self) -> list[int]:
        """0, and where each document ends."""
        return list(accumulate(self.lengths, initial=0))

    @cached_property
    def kin(self) -> list[tuple[int, int]]:
        """The first document of those that stay together, and the one after their last.

        Documents whose first token is the label of the last one before stay with it.
        """
        free = [True, *(self.labels[self.ends[1:-1]] == IGNORED).tolist()]
        return list(pairwise([*(number for number, is_free in enumerate(free) if is_free), len(free)]))


def rows_of(batch: Mapping[str, Any]) -> Rows:
    """The rows of a batch of a causal language model, (B, S) or packed (B, S) with positions that start anew.

    Raises:
        UnfitError: it holds something that cannot be laid end to end.
    """
    _check(batch)
    ids, labels = batch["input_ids"], batch["labels"].clone()
    labels[:, 0] = IGNORED
    mask, at = batch.get("attention_mask"), batch.get("position_ids")
    if mask is None:
        documents = _documents(ids, at)
        ids_T, labels_T = ids.reshape(-1), labels.reshape(-1)
    else:
        lengths = _lengths(mask != 0, labels, at)
        documents = tuple(n for n in lengths if n)
        ids_T, labels_T = (torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)]) for t in (ids, labels))
    share = Share(len(ids_T), int((labels_T != IGNORED).sum()))
    return Rows(ids_T, labels_T, documents, ids.numel(), (share,))


def _lengths(kept: Tensor, labels: Tensor, positions: Tensor | None) -> list[int]:
    """Tokens of each row, of which ``kept`` (B, S) says what is no padding. Models see any number but 0 as kept."""
    if bool((kept[:, 1:] > kept[:, :-1]).any()):
        raise UnfitError("its padding is not on the right")
    if bool((labels[~kept] != IGNORED).any()):
        raise UnfitError("its padding has labels")
    if positions is not None and bool((positions - torch.arange(kept.shape[1], device=kept.device))[kept].any()):
        raise UnfitError(LEAKS)
    return kept.sum(1).tolist()


def _check(batch: Mapping[str, Any]) -> None:
    names = frozenset(name for name, value in batch.items() if value is not None)
    if strange := names - USED - BOUNDARIES:
        raise UnfitError(f"it carries {', '.join(sorted(strange))}")
    if missing := {"input_ids", "labels"} - names:
        raise UnfitError(f"it carries no {', '.join(sorted(missing))}")
    shapes = {tuple(batch[name].shape) for name in names & USED}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise UnfitError(f"its tensors are {', '.join(map(str, sorted(shapes)))}, not all (rows, length)")


def _documents(ids: Tensor, positions: Tensor | None) -> tuple[int, ...]:
    """Lengths of what attends to itself alone: whole rows, or parts of rows where positions start anew."""
    rows, length = ids.shape
    if positions is None:
        return (length,) * rows
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if positions[begins].any():
        raise UnfitError("its positions do not start at 0")
    bounds = [*begins.reshape(-1).nonzero()[:, 0].tolist(), ids.numel()]
    return tuple(end - begin for begin, end in pairwise(bounds))


def joined(parts: Sequence[Rows]) -> Rows:
    """All of them as one."""
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    lengths = tuple(n for part in parts for n in part.lengths)
    shares = tuple(share for part in parts for share in part.shares)
    return Rows(ids, labels, lengths, sum(part.padded for part in parts), shares)


def divided(rows: Rows, count: int) -> list[Rows]:
    """``rows`` in at most ``count`` parts of about as many tokens, no document cut in two, in the order they have.

    Documents go where the middle of their kin is, so that no part is longer than its share and the longest of them.
    """
    ends = rows.ends
    parts = []
    for _, group in groupby(rows.kin, key=lambda kin: int((ends[kin[0]] + ends[kin[1]]) / 2 * count / rows.tokens)):
        (first, last), *_, (_, last) = [*group] * 2
        begin, end = ends[first], ends[last]
        shares = _between(rows.shares, begin, end)
        part = Rows(rows.input_ids[begin:end], rows.labels[begin:end], rows.lengths[first:last], end - begin, shares)
        parts.append(part)
    return parts


def _between(shares: Sequence[Share], begin: int, end: int) -> tuple[Share, ...]:
    """What the tokens from ``begin`` to before ``end`` have of each batch."""
    bounds = pairwise(accumulate((share.tokens for share in shares), initial=0))
    overlaps = [min(end, last) - max(begin, first) for first, last in bounds]
    return tuple(Share(n, share.trained) for n, share in zip(overlaps, shares, strict=True) if n > 0)


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(T,): 0, 1, 2... in each document."""
    sizes = torch.tensor(lengths, device=device)
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=sum(lengths))
    return torch.arange(len(begins), device=device) - begins
