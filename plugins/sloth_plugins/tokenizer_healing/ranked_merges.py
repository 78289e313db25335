"""The merges of a byte-level vocabulary that says no more than in which order its tokens were made.

A token of n bytes can be cut in n - 1 places, and every cut into two tokens is a merge: 270,000 of 750,000 cuts of a
vocabulary of 131,072. Looking each half up in a dictionary takes most of a rebuild, so the halves are looked up all at
once, by polynomial hashes of their bytes. A half that was taken for another, which once in 10^8 vocabularies may come
to pass, makes a union that is no token, and tokenizers refuses to build such a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sloth_plugins.tokenizer_healing.rebuild import CannotRebuild

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""
FILTER_BITS = 22


class Bytes:
    """All tokens' bytes in a row, and the hash of any part: sum of (byte + 1) BASE^place, modulo 2^64.

    Attributes:
        starts: where each token begins.
        ends: where it ends.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        raw = np.frombuffer(b"".join(tokens), np.uint8)
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self._down = _powers(pow(BASE, -1, 1 << 64), len(raw) + 1)
        parts = (raw.astype(np.uint64) + np.uint64(1)) * _powers(BASE, len(raw))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.add.accumulate(parts)])

    def hashes(self, starts: Ints, ends: Ints) -> Hashes:
        """The hash of each part, wherever it stands."""
        return (self._sums[ends] - self._sums[starts]) * self._down[starts]


def merges(tokens: Sequence[bytes]) -> tuple[Ints, Ints]:
    """The places in ``tokens`` of the left and of the right halves whose union is a token, in the order of the unions.

    The pairs that make one token may overlap in a text only where it repeats itself, and there tiktoken takes the
    leftmost: the longest left half first comes to the same.

    Args:
        tokens: different byte strings, in the order of merging.

    Raises:
        CannotRebuild: two tokens have the same hash (of 131,072 tokens once in 10^9 vocabularies).
    """
    data = Bytes(tokens)
    own = data.hashes(data.starts, data.ends)
    order = np.argsort(own)
    known = own[order]
    if (known[1:] == known[:-1]).any():
        raise CannotRebuild("two of its tokens have the same hash")
    whole, cuts = _cuts(data)
    halves = data.hashes(data.starts[whole], cuts), data.hashes(cuts, data.ends[whole])
    kept = np.logical_and(*_likely(known, halves))
    left, right = (_places(known, half[kept]) for half in halves)
    found = (left >= 0) & (right >= 0)
    return order[left[found]], order[right[found]]


def _likely(known: Hashes, wanted: Iterable[Hashes]) -> list[NDArray[np.bool_]]:
    """False where one of ``wanted`` is certainly not ``known``, which is quicker to tell than where it stands."""
    shift = np.uint64(64 - FILTER_BITS)
    filled = np.zeros(1 << FILTER_BITS, bool)
    filled[known >> shift] = True
    return [filled[hashes >> shift] for hashes in wanted]


def _places(known: Hashes, wanted: Hashes) -> Ints:
    """Where each of ``wanted`` stands in ``known``, which is sorted; -1 where nowhere."""
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, places, -1)


def _powers(base: int, count: int) -> Hashes:
    powers = np.full(max(count, 1), base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)[:count]


def _cuts(data: Bytes) -> tuple[Ints, Ints]:
    """Each place where a token can be cut, its last byte first, and the token."""
    counts = np.maximum(data.ends - data.starts - 1, 0)
    whole = np.repeat(np.arange(len(counts)), counts)
    return whole, data.ends[whole] - 1 - (np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts))
