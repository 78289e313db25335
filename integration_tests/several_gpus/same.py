"""When two runs are the same."""

from __future__ import annotations

import pytest
import torch

from integration_tests.several_gpus.launching import Outcome


def assert_same(ours: Outcome, stock: Outcome, losses: bool = True) -> None:
    """Losses within 1e-5, relative, weights within 1e-5 of the largest of a parameter: sums in another order."""
    if losses:
        assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.evaluation == pytest.approx(stock.evaluation, rel=1e-5)
    assert ours.weights.keys() == stock.weights.keys()
    assert any(weight.abs().max() > 0 for weight in stock.weights.values())
    for name, theirs in stock.weights.items():
        torch.testing.assert_close(ours.weights[name], theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def assert_equal_in_all_processes(outcomes: list[Outcome]) -> None:
    """To the bit."""
    for name, weight in outcomes[0].weights.items():
        assert all(torch.equal(weight, other.weights[name]) for other in outcomes[1:]), name
