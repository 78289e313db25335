"""Batches taken apart into rows, laid end to end, and divided into passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sloth_plugins.batch_fusion.budget import Budget
from sloth_plugins.batch_fusion.rows import IGNORED, Rows, UnfitError, divided, joined, positions, rows_of


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rows 1.., each token its own id, padded on the right with 0."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.arange(1, sum(lengths) + 1)
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, IGNORED), "attention_mask": mask.long()}


def of_lengths(lengths: tuple[int, ...]) -> Rows:
    ids = torch.arange(sum(lengths))
    return Rows(ids, ids, lengths, sum(lengths))


def test_padding_goes_and_first_labels_are_ignored() -> None:
    rows = rows_of(padded([3, 1, 4]))
    assert rows.lengths == (3, 1, 4)
    assert rows.padded == 12
    assert rows.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows.labels.tolist() == [IGNORED, 2, 3, IGNORED, IGNORED, 6, 7, 8]


def test_the_host_keeps_its_batch() -> None:
    batch = padded([2, 2])
    rows_of(batch)
    assert batch["labels"].tolist() == [[1, 2], [3, 4]]


def test_rows_without_a_token_go() -> None:
    batch = padded([2, 3])
    batch["attention_mask"][0] = 0
    assert rows_of(batch).lengths == (3,)


def test_packed_rows_are_taken_apart_where_positions_start_anew() -> None:
    ids = torch.arange(10).view(2, 5)
    rows = rows_of({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])})
    assert rows.lengths == (2, 3, 5)
    assert rows.labels.tolist() == [IGNORED, 1, 2, 3, 4, IGNORED, 6, 7, 8, 9]


def test_rows_without_a_mask_are_whole() -> None:
    assert rows_of({"input_ids": torch.ones(3, 4), "labels": torch.ones(3, 4)}).lengths == (4, 4, 4)


IDS = torch.ones(1, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"labels": IDS}, "carries no input_ids"),
        ({"input_ids": IDS, "labels": IDS, "pixel_values": IDS}, "carries pixel_values"),
        ({"input_ids": IDS, "labels": IDS[0]}, "not all"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[0, 1, 1]])}, "not on the right"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[1, 0, 1]])}, "not on the right"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS, "position_ids": IDS}, "both"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": torch.tensor([[4, 5, 6]])}, "do not start at 0"),
    ],
)
def test_what_does_not_fit_is_named(batch: dict[str, Any], why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        rows_of(batch)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 12))
def test_dividing_keeps_order_and_balances(lengths: list[int], count: int) -> None:
    rows = of_lengths(tuple(lengths))
    parts = divided(rows, count)
    assert 1 <= len(parts) <= count
    whole = joined(parts)
    assert whole.lengths == rows.lengths
    assert torch.equal(whole.input_ids, rows.input_ids)
    assert max(part.tokens for part in parts) <= rows.tokens / count + max(lengths)


def test_positions_start_anew_in_each_document() -> None:
    assert positions((3, 1, 2), torch.device("cpu")).tolist() == [0, 1, 2, 0, 0, 1]


def test_ways_that_cannot_be_cheaper_are_not_planned() -> None:
    asked: list[int] = []

    class Host(Prices):
        least_seconds = 1.0

        def pass_seconds(self, tokens: int, longest: int, autocast: torch.dtype | None, alone: bool) -> float | None:
            asked.append(tokens)
            return 1.5

    ways = [divided(of_lengths((10, 10, 10, 10)), n) for n in range(1, 5)]
    assert len(Budget(Host(0, 100), None).best(ways, 10)) == 1
    assert asked == [40]


class Prices:
    """A planner for whom tokens beyond ``free`` cost a second each, and none beyond ``limit`` fit."""

    least_seconds = 0.0
    transient = False

    def __init__(self, free: int, limit: int, saves_memory: bool = False) -> None:
        self.free, self.limit, self.saves_memory = free, limit, saves_memory

    def pass_seconds(self, tokens: int, longest: int, autocast: torch.dtype | None, alone: bool) -> float | None:
        return None if tokens > self.limit else float(max(0, tokens - self.free))


@pytest.mark.parametrize(
    ("planner", "largest", "passes"),
    [
        (Prices(1000, 1000), 10, 1),
        (Prices(20, 1000), 10, 2),
        (Prices(1000, 10), 10, 4),
        (Prices(0, 5), 10, 4),
        (Prices(1000, 1000, saves_memory=True), 20, 2),
        (None, 10, 4),
        (None, 40, 1),
    ],
)
def test_as_few_passes_as_pay(planner: Prices | None, largest: int, passes: int) -> None:
    ways = [divided(of_lengths((10, 10, 10, 10)), n) for n in range(1, 5)]
    assert len(Budget(planner, None).best(ways, largest)) == passes
