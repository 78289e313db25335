"""When two runs are the same."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from integration_tests.several_gpus.launching import Outcome


def assert_same(ours: Outcome, stock: Outcome, losses: bool = True) -> None:
    """Losses within 1e-5, relative, weights within 1e-5 of the largest of a parameter: sums in another order."""
    if losses:
        assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.evaluation == pytest.approx(stock.evaluation, rel=1e-5)
    assert any(weight.abs().max() > 0 for weight in stock.weights.values())
    assert_close(ours.weights, stock.weights, 1e-5)


def assert_close(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], relative: float) -> None:
    """Within ``relative`` of the largest of a parameter."""
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=relative * weight.abs().max().item())


def assert_as_near(ours: Outcome, stock: Outcome, exact: Outcome, tolerance: float) -> None:
    """Losses, each as near to those in float32 as stock's are, but for ``tolerance``, of itself."""
    for truth, plain, mine in zip(exact.losses, stock.losses, ours.losses, strict=True):
        assert abs(mine - truth) <= abs(plain - truth) + tolerance * truth


def assert_equal_in_all_processes(outcomes: list[Outcome]) -> None:
    """To the bit."""
    for name, weight in outcomes[0].weights.items():
        assert all(torch.equal(weight, other.weights[name]) for other in outcomes[1:]), name
