"""A loss that answers from the host, and batches that are fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from sloth_plugins.batch_fusion.ahead import Ahead
from sloth_plugins.batch_fusion.known_loss import KnownLoss


def known(value: float, *copies: float) -> KnownLoss:
    """A loss of ``value`` whose copies say something else, so that it shows who was asked."""
    terms = [SimpleNamespace(read=lambda copy=copy: torch.tensor(copy)) for copy in copies]
    return KnownLoss(torch.tensor(value), terms)


@pytest.mark.parametrize(
    ("copies", "nan", "inf"),
    [((1.0, 2.0), False, False), ((1.0, float("nan")), True, False), ((float("inf"), 1.0), False, True)],
)
def test_the_copies_answer(copies: tuple[float, ...], nan: bool, inf: bool) -> None:
    loss = known(3.0, *copies)
    assert (bool(torch.isnan(loss)), bool(torch.isinf(loss))) == (nan, inf)


def test_in_all_else_it_is_a_tensor() -> None:
    total, loss = torch.tensor(1.0), known(3.0, 7.0)
    total += loss
    assert type(total) is torch.Tensor
    assert total.item() == 4.0
    assert type(loss + 1) is torch.Tensor
    assert (loss.device, loss.item(), float(loss)) == (torch.device("cpu"), 3.0, 3.0)
    assert type(loss.detach().clone()) is torch.Tensor


def items(end: Exception | None = None) -> Iterator[int]:
    yield from range(3)
    if end is not None:
        raise end


def test_items_come_in_order_however_they_were_fetched() -> None:
    ahead = Ahead(items())
    ahead.fetch(2)
    assert next(ahead) == 0
    ahead.fetch(2)
    assert list(ahead) == [1, 2]
    ahead.fetch(2)
    assert list(ahead) == []


def test_a_failure_comes_when_its_item_is_asked_for() -> None:
    ahead = Ahead(items(ValueError("row 3")))
    ahead.fetch(9)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(ahead)


def test_a_loader_that_has_ended_is_not_asked_again() -> None:
    given: list[int] = []
    ahead = Ahead(given.append(i) or i for i in range(5))
    ahead.fetch(9, lambda: len(given) == 3)
    assert given == [0, 1, 2]
    assert list(ahead) == [0, 1, 2, 3, 4]
