"""Columns of token ids as flat arrays, read from wherever a data set keeps them, without a copy where that is Arrow."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

LIMIT = 250_000
"""Rows of an Arrow table that are looked at: all of a smaller one, evenly spaced blocks of a larger one."""
BLOCK = 1_000
FEW_OF = 8
"""Fewer rows than one in this many are copied one by one."""
FEW = 256
"""Rows that are looked at one by one, where a data set makes each when it is asked for it."""


class Ragged(NamedTuple):
    """Rows of integers: row i is ``values[offsets[i] : offsets[i + 1]]``; offsets are (rows + 1)."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)


Piece = dict[str, Ragged]
"""Consecutive rows: column -> its values."""


class Unreadable(Exception):
    """Why no rows can be looked at, as a clause."""


class Source(NamedTuple):
    """A data set's columns of integers, and ways to read them.

    Attributes:
        columns: their names.
        total: rows of the data set; None where only iterating would tell.
        looked_at: rows that ``pieces`` yields, at most.
        pieces: the rows.
    """

    columns: tuple[str, ...]
    total: int | None
    looked_at: int
    pieces: Iterator[Piece]


def open_source(dataset: Any) -> Source:
    """How ``dataset`` can be looked at without taking rows from it.

    Raises:
        Unreadable: it cannot.
    """
    if hasattr(dataset, "with_format") and hasattr(dataset, "features"):
        if hasattr(dataset, "__len__") and (dataset.format or {}).get("type") != "custom":
            return _arrow(dataset)
        if hasattr(dataset, "take") and not hasattr(dataset, "__len__"):
            return _from_rows(list(dataset.take(FEW)), None)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        total = len(dataset)
        with _same_random_numbers():
            return _from_rows([dataset[int(i)] for i in _spread(total, min(FEW, total))], total)
    raise Unreadable("it can only be iterated over, which would take rows from it")


def _spread(total: int, count: int) -> np.ndarray:
    return np.linspace(0, total, count, endpoint=False, dtype=np.int64)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Rows that are made by chance leave the run's random numbers as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _arrow(dataset: Any) -> Source:
    import pyarrow

    types, schema = pyarrow.types, dataset.data.schema

    def is_tokens(kind: Any) -> bool:
        listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return listed and types.is_integer(kind.value_type)

    names = tuple(name for name in dataset.column_names if is_tokens(schema.field(name).type))
    if not names or not len(dataset):
        return Source(names, len(dataset), 0, iter(()))
    wanted = _wanted(dataset)
    table = dataset.data.table.select(list(names))
    total = len(dataset) if wanted is None else len(wanted)
    if total > LIMIT:
        blocks = [np.arange(start, start + BLOCK) for start in _spread(total - BLOCK, LIMIT // BLOCK)]
        places = np.concatenate(blocks)
        wanted = places if wanted is None else wanted[places]
    return Source(names, total, min(total, LIMIT), _pieces(table, wanted))


def _wanted(dataset: Any) -> np.ndarray | None:
    """Places in the table of the rows that a data set shows, ascending and each once; None for all of them.

    A data set that was shuffled, filtered or selected from keeps the whole table, and reading it in its own order takes
    longer than tokenising.
    """
    places = getattr(dataset, "_indices", None)
    return None if places is None else np.unique(places.column(0).to_numpy())


def _pieces(table: Any, wanted: np.ndarray | None) -> Iterator[Piece]:
    start = 0
    for batch in table.to_batches():
        stop = start + len(batch)
        if wanted is None:
            yield {name: _ragged(batch.column(name)) for name in batch.schema.names}
        else:
            first, last = np.searchsorted(wanted, (start, stop))
            if first < last:
                rows = wanted[first:last] - start
                yield {name: _taken(_ragged(batch.column(name)), rows) for name in batch.schema.names}
        start = stop


def _taken(column: Ragged, rows: np.ndarray) -> Ragged:
    """Some of the rows, ascending."""
    lengths = column.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths[rows])])
    if len(rows) == len(lengths):
        return column
    if FEW_OF * len(rows) < len(lengths):
        bounds = zip(column.offsets[rows], column.offsets[rows + 1], strict=True)
        return Ragged(np.concatenate([column.values[first:last] for first, last in bounds]), offsets)
    chosen = np.zeros(len(lengths), bool)
    chosen[rows] = True
    return Ragged(column.values[np.repeat(chosen, lengths)], offsets)


def _ragged(array: Any) -> Ragged:
    if not hasattr(array, "offsets"):  # all rows of one size
        offsets = np.arange(len(array) + 1, dtype=np.int64) * array.type.list_size
        return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets)
    offsets = array.offsets.to_numpy()
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    return Ragged(values.to_numpy(zero_copy_only=False), offsets - offsets[0])


def _from_rows(rows: Sequence[Any], total: int | None) -> Source:
    if not all(isinstance(row, Mapping) for row in rows):
        raise Unreadable("its rows are no mappings from names to values")
    first = rows[0] if rows else {}
    names = tuple(name for name in first if _integers(first[name]) is not None and all(name in row for row in rows))
    piece = {name: _joined([_integers(row[name]) for row in rows]) for name in names}
    return Source(names, total, len(rows), iter([piece] if rows and names else ()))


def _integers(value: Any) -> np.ndarray | None:
    """A row's value as an array (n,), None where it is not one of integers."""
    if not isinstance(value, (list, tuple, np.ndarray, torch.Tensor)):
        return None
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (int, np.integer)) for item in value):
        return None
    array = np.asarray(value)
    if array.size == 0:
        return np.zeros(0, np.int64)
    return array if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else None


def _joined(rows: Sequence[np.ndarray | None]) -> Ragged:
    known = [row if row is not None else np.zeros(0, np.int64) for row in rows]
    return Ragged(np.concatenate(known), np.cumsum([0, *map(len, known)]))
