"""What a host tells of its tokenised rows, for plugins that look at them before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Overflow = Literal["keep_start", "keep_end", "drop", "split", "keep"]


@dataclass(frozen=True)
class Rows:
    """One data set of a run.

    Attributes:
        name: ``train``, ``eval``, or the name that the user gave it.
        dataset: what the host iterates over: a ``datasets.Dataset`` or ``IterableDataset``, or one of torch.
        max_length: the tokens that a row may have; None where the host bounds nothing.
        longer: what the host does with rows of more: keeps their first or their last ``max_length`` tokens, drops
            them, splits them into several, or keeps them.
        drops_emptied: whether the host drops rows that have no trained token left when they are cut.
    """

    name: str
    dataset: object
    max_length: int | None = None
    longer: Overflow = "keep"
    drops_emptied: bool = False

    @property
    def trains(self) -> bool:
        """Whether the model learns from them."""
        return self.name == "train"
