"""Batches as rows without padding, and rows laid end to end as one batch. Everything stays on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from sloth_kernels.documents import documents_of

IGNORED = -100
"""A label that no loss counts."""
USED = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})
SAY_THE_SAME = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
"""What a batch may carry beside, which the positions say already."""


class UnfitError(Exception):
    """A batch that cannot be taken apart into rows; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Rows laid end to end.

    Attributes:
        input_ids: (T,).
        labels: (T,), each the token's own; ``IGNORED`` where a row of a batch begins, as nothing comes before it.
        lengths: of the documents: a row of a packed batch holds several. Their sum is T.
        padded: the tokens of the batch that they are from, padding included.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    padded: int

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)


def rows_of(batch: Mapping[str, Any]) -> Rows:
    """The rows of a batch of a causal language model, (B, S) or packed (B, S) with positions that start anew.

    Raises:
        UnfitError: it holds something that cannot be laid end to end.
    """
    _check(batch)
    ids, labels = batch["input_ids"], batch["labels"].clone()
    labels[:, 0] = IGNORED
    kept = batch.get("attention_mask")
    if kept is None:
        return Rows(ids.reshape(-1), labels.reshape(-1), _documents(ids, batch.get("position_ids")), ids.numel())
    if bool((kept[:, 1:] > kept[:, :-1]).any()):
        raise UnfitError("its padding is not on the right")
    lengths = kept.sum(1).tolist()
    flat_ids, flat_labels = (torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)]) for t in (ids, labels))
    return Rows(flat_ids, flat_labels, tuple(n for n in lengths if n), ids.numel())


def _check(batch: Mapping[str, Any]) -> None:
    names = frozenset(name for name, value in batch.items() if value is not None)
    if strange := names - USED - SAY_THE_SAME:
        raise UnfitError(f"it carries {', '.join(sorted(strange))}")
    if missing := {"input_ids", "labels"} - names:
        raise UnfitError(f"it carries no {', '.join(sorted(missing))}")
    shapes = {tuple(batch[name].shape) for name in names & USED}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise UnfitError(f"its tensors are {', '.join(map(str, sorted(shapes)))}, not all (rows, length)")
    if {"attention_mask", "position_ids"} <= names:
        raise UnfitError("it carries both attention_mask and position_ids")


def _documents(ids: Tensor, positions: Tensor | None) -> tuple[int, ...]:
    """Lengths of what attends to itself alone: whole rows, or parts of rows where positions start anew."""
    rows, length = ids.shape
    if positions is None:
        return (length,) * rows
    lengths = tuple(n for row in positions.split(1) for n in documents_of(row).lengths)
    if positions.reshape(-1)[list(accumulate(lengths[:-1], initial=0))].any():
        raise UnfitError("its positions do not start at 0")
    return lengths


def joined(parts: Sequence[Rows]) -> Rows:
    """All of them as one."""
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    return Rows(ids, labels, tuple(n for part in parts for n in part.lengths), sum(part.padded for part in parts))


def divided(rows: Rows, count: int) -> list[Rows]:
    """``rows`` in at most ``count`` parts of about as many tokens, no document cut in two, in the order they have.

    A document goes where its middle is, so that no part is longer than its share and the longest document.
    """
    ends = list(accumulate(rows.lengths, initial=0))
    middles = [(begin + end) / 2 for begin, end in pairwise(ends)]
    parts = []
    for _, numbers in groupby(range(len(middles)), key=lambda i: int(middles[i] * count / rows.tokens)):
        first, *_, last = [*numbers] * 2
        begin, end = ends[first], ends[last + 1]
        documents = rows.lengths[first : last + 1]
        parts.append(Rows(rows.input_ids[begin:end], rows.labels[begin:end], documents, end - begin))
    return parts


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(T,): 0, 1, 2... in each document."""
    longest = torch.arange(max(lengths), device=device)
    return torch.cat([longest[:n] for n in lengths])
