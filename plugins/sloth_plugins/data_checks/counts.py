"""What is counted, text by text, in flat arrays: lengths, trained tokens, what a cut takes away, ids without a row.

The n-th token's label is what the token before it predicts, so the first label of a row trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sloth_backend.data import Rows
from sloth_plugins.data_checks.columns import Piece, Ragged

IGNORED = -100
EXAMPLES = 3


class Text(NamedTuple):
    """How columns make up what the model sees of a row.

    Attributes:
        ids: columns of token ids, one after another. The last of several is an answer, which trains whole.
        labels: column of the labels of a single ``ids``; None where there is none.
    """

    ids: tuple[str, ...]
    labels: str | None = None


LAYOUTS: tuple[tuple[Text, ...], ...] = (
    (Text(("prompt_ids", "chosen_ids")), Text(("prompt_ids", "rejected_ids"))),
    (Text(("prompt_ids", "completion_ids")),),
    (Text(("chosen_ids",)), Text(("rejected_ids",))),
    (Text(("chosen_input_ids",), "chosen_labels"), Text(("rejected_input_ids",), "rejected_labels")),
    (Text(("input_ids",), "labels"),),
    (Text(("input_ids",)),),
)
"""Texts of a row, by the columns that it has; the first layout that is there in full counts."""


def texts_of(columns: tuple[str, ...]) -> tuple[Text, ...]:
    """The texts of rows with these columns; none where they are not tokenised."""
    found = set(columns)
    wanted = ((layout, {name for text in layout for name in (*text.ids, text.labels) if name}) for layout in LAYOUTS)
    return next((layout for layout, names in wanted if names <= found), ())


@dataclass
class Counts:
    """Sums over the rows that were looked at.

    Attributes:
        lengths: tokens of each row, before any cut that is still to come.
        last: the last id of each row, -1 of one without tokens.
        longer: rows of more tokens than the bound; ``lost`` are their tokens beyond it.
        untrained: rows without a trained token before the cut.
        emptied: rows that have one, but none left behind the cut; ``shortened`` lose some.
        masked: whether some tokens of a row are not trained: the others are then an answer.
        beyond: ids without a row in the embedding, as far as examples are shown; ``beyond_rows`` rows have one.
        labels_beyond: labels that no logit stands for, likewise.
        uneven: rows with more or fewer labels than ids.
    """

    lengths: list[np.ndarray] = field(default_factory=list)
    last: list[np.ndarray] = field(default_factory=list)
    longer: int = 0
    lost: int = 0
    untrained: int = 0
    emptied: int = 0
    shortened: int = 0
    known: int = 0
    masked: bool = False
    beyond: set[int] = field(default_factory=set)
    beyond_rows: int = 0
    labels_beyond: set[int] = field(default_factory=set)
    labels_beyond_rows: int = 0
    uneven: int = 0

    def add(self, piece: Piece, text: Text, rows: Rows, embedding_rows: int | None) -> None:
        """Count one text of each row of ``piece``."""
        columns = [piece[name] for name in text.ids]
        lengths = np.sum([column.lengths for column in columns], axis=0)
        self.lengths.append(lengths)
        self.last.append(_last(columns[-1]))
        bound = rows.max_length if rows.longer in ("keep_start", "keep_end") else None
        over = lengths > rows.max_length if rows.max_length else np.zeros(len(lengths), bool)
        self.longer += int(over.sum())
        if rows.max_length and rows.longer != "split":
            gone = lengths - rows.max_length if rows.longer != "drop" else lengths
            self.lost += int(gone[over].sum())
        if embedding_rows:
            for column in columns:
                self.beyond_rows += _outside(column, embedding_rows, self.beyond)
        if text.labels is not None:
            self._add_labels(piece[text.labels], lengths, bound, rows, embedding_rows)
        elif len(columns) > 1:
            before, after = _answer(columns, lengths, bound, rows.longer)
            self._add_trained(before, after)
            self.masked = True

    def _add_labels(
        self, labels: Ragged, lengths: np.ndarray, bound: int | None, rows: Rows, embedding_rows: int | None
    ) -> None:
        self.uneven += int((labels.lengths != lengths).sum())
        if embedding_rows:
            self.labels_beyond_rows += _outside(labels, embedding_rows, self.labels_beyond, IGNORED)
        trained = labels.values != IGNORED
        self.masked |= not trained.all()
        sums = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        start, stop = labels.offsets[:-1], labels.offsets[1:]
        before = sums[stop] - sums[np.minimum(start + 1, stop)]
        if bound is None:
            dropped = lengths > rows.max_length if rows.longer == "drop" and rows.max_length else False
            self._add_trained(before, np.where(dropped, 0, before))
            return
        first = np.maximum(start, stop - bound) if rows.longer == "keep_end" else start
        last = np.minimum(stop, start + bound) if rows.longer == "keep_start" else stop
        self._add_trained(before, sums[last] - sums[np.minimum(first + 1, last)])

    def _add_trained(self, before: np.ndarray, after: np.ndarray) -> None:
        self.known += len(before)
        self.untrained += int((before == 0).sum())
        self.emptied += int(((before > 0) & (after == 0)).sum())
        self.shortened += int(((after > 0) & (after < before)).sum())


def _last(column: Ragged) -> np.ndarray:
    """The last id of each row, -1 of one without tokens."""
    if not len(column.values):
        return np.full(len(column.lengths), -1)
    return np.where(column.lengths > 0, column.values[np.maximum(column.offsets[1:] - 1, 0)], -1)


def _answer(
    columns: list[Ragged], lengths: np.ndarray, bound: int | None, longer: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the last column before and behind the cut."""
    answer = columns[-1].lengths
    if bound is None:
        return answer, answer
    if longer == "keep_end":
        return answer, np.minimum(answer, bound)
    return answer, np.clip(bound - (lengths - answer), 0, answer)


def _outside(column: Ragged, size: int, examples: set[int], ignored: int | None = None) -> int:
    """Rows with a value that is no number from 0 to ``size`` - 1; some of the values go into ``examples``."""
    values = column.values
    if not len(values) or (values.min() >= 0 and values.max() < size):
        return 0
    wrong = (values < 0) | (values >= size)
    if ignored is not None:
        wrong &= values != ignored
    places = np.flatnonzero(wrong)
    examples.update(int(value) for value in np.unique(values[places])[: EXAMPLES - len(examples)])
    return len(np.unique(np.searchsorted(column.offsets, places, side="right")))
