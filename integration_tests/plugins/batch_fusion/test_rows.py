"""Batches taken apart into rows, laid end to end, and divided into passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sloth_plugins.batch_fusion.budget import Budget
from sloth_plugins.batch_fusion.rows import IGNORED, Rows, Share, UnfitError, divided, joined, positions, rows_of


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rows 1.., each token its own id, padded on the right with 0."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.arange(1, sum(lengths) + 1)
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, IGNORED), "attention_mask": mask.long()}


def of_lengths(lengths: tuple[int, ...], kin: tuple[int, ...] = ()) -> Rows:
    """Documents whose first labels are ignored, but those of the documents ``kin``."""
    ids = torch.arange(sum(lengths))
    labels, begins = ids.clone(), [sum(lengths[:i]) for i in range(len(lengths)) if i not in kin]
    labels[begins] = IGNORED
    return Rows(ids, labels, lengths, sum(lengths), (Share(sum(lengths), int((labels != IGNORED).sum())),))


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
    batch["labels"][0] = IGNORED
    assert rows_of(batch).lengths == (3,)


def test_packed_rows_are_taken_apart_where_positions_start_anew() -> None:
    ids = torch.arange(10).view(2, 5)
    rows = rows_of({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])})
    assert rows.lengths == (2, 3, 5)
    assert rows.labels.tolist() == [IGNORED, 1, 2, 3, 4, IGNORED, 6, 7, 8, 9]


def test_any_number_but_zero_is_no_padding_as_for_models() -> None:
    batch = padded([4, 2])
    batch["attention_mask"] = torch.tensor([[1, 1, 3, 3], [2, 2, 0, 0]])
    assert rows_of(batch).lengths == (4, 2)


def test_positions_that_count_rows_say_nothing_new() -> None:
    batch = padded([4, 2])
    plain = rows_of(batch)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3], [0, 1, 7, 7]])
    rows = rows_of(batch)
    assert (rows.lengths, rows.shares) == (plain.lengths, plain.shares)
    assert torch.equal(rows.input_ids, plain.input_ids)


def test_rows_know_what_they_have_of_each_batch() -> None:
    rows = joined([rows_of(padded([3, 1])), rows_of(padded([4, 4]))])
    assert rows.shares == (Share(4, 2), Share(8, 6))
    assert [part.shares for part in divided(rows, 3)] == [(Share(4, 2),), (Share(4, 6),), (Share(4, 6),)]
    rows = joined([rows_of(padded([6, 1])), rows_of(padded([1, 6]))])
    assert [part.shares for part in divided(rows, 3)] == [(Share(6, 5),), (Share(1, 5), Share(1, 5)), (Share(6, 5),)]


def test_a_document_whose_first_token_is_trained_stays_with_the_one_before() -> None:
    assert [part.lengths for part in divided(of_lengths((4, 4, 4, 4), kin=(1, 3)), 4)] == [(4, 4), (4, 4)]


def test_rows_without_a_mask_are_whole() -> None:
    assert rows_of({"input_ids": torch.ones(3, 4), "labels": torch.ones(3, 4)}).lengths == (4, 4, 4)


IDS, AGAIN = torch.ones(1, 3, dtype=torch.long), torch.tensor([[0, 1, 0]])
NUMBERED = torch.tensor([[1, 1, 2]])


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"labels": IDS}, "carries no input_ids"),
        ({"input_ids": IDS, "labels": IDS, "pixel_values": IDS}, "carries pixel_values"),
        ({"input_ids": IDS, "labels": IDS[0]}, "not all"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[0, 1, 1]])}, "not on the right"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[1, 0, 1]])}, "not on the right"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[1, 1, 0]])}, "padding has labels"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS, "position_ids": AGAIN}, "does not keep"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": NUMBERED, "position_ids": AGAIN}, "does not keep"),
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
