"""FSDP2 through accelerate and TRL, on two processes: the losses and weights of stock, with whole layers as programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 2


def assert_same(ours: Outcome, stock: Outcome, weights: float = 1e-3) -> None:
    """Losses within 1e-5, relative; weights within ``weights`` of the largest of a parameter.

    Adam makes steps of one size of gradients that are next to nothing and differ by their roundings.
    """
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.evaluation == pytest.approx(stock.evaluation, rel=1e-5)
    assert ours.weights.keys() == stock.weights.keys()
    for name, theirs in stock.weights.items():
        torch.testing.assert_close(ours.weights[name], theirs, rtol=0, atol=weights * theirs.abs().max().item())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_loop(method: str, tmp_path: Path) -> None:
    """Equal to stock sharded alike and to stock under DDP, in as many collectives."""
    cases = [
        Case("ours", strategy="fsdp2", method=method, steps=2),
        Case("stock", strategy="fsdp2", method=method, steps=2, backend=False),
        Case("whole", method=method, steps=2, backend=False),
    ]
    found = launch(cases, tmp_path)
    for rank in range(2):
        ours, stock = found["ours"][rank], found["stock"][rank]
        assert len(ours.changed("layer_program")) == LAYERS
        assert ours.changed("linear_cross_entropy") == ["loss"]
        assert_same(ours, stock)
        assert_same(ours, found["whole"][rank])
        assert ours.collectives == stock.collectives
        assert ours.collectives["c10d::_allgather_base_"] > 0
    assert all(torch.equal(w, found["ours"][1].weights[name]) for name, w in found["ours"][0].weights.items())


def test_sft_passes_an_accumulation_step_at_once(tmp_path: Path) -> None:
    """Parameters are gathered once a step, where stock gathers them once for each micro-batch."""
    common = {"host": "sft", "strategy": "fsdp2", "method": "lora", "steps": 2}
    found = launch([Case("ours", **common), Case("stock", backend=False, **common)], tmp_path)
    ours, stock = found["ours"][0], found["stock"][0]
    assert ours.changed("batch_fusion") == ["micro-batches"]
    assert_same(ours, stock)
    gathers = "c10d::_allgather_base_"
    assert 0 < ours.collectives[gathers] < stock.collectives[gathers]


def test_saving_and_going_on(tmp_path: Path) -> None:
    """A sharded run that goes on from what it saved ends with the weights of one that never stopped."""
    common = {"strategy": "fsdp2", "accumulation": 1}
    for method in ("full", "lora"):
        folder = tmp_path / method
        saved = launch([Case("through", steps=3, save_at=3, method=method, **common)], folder)["through"]
        resumed = Case("resumed", steps=0, resume=str(folder / "through"), method=method, **common)
        again = launch([resumed], folder / "again")["resumed"]
        for name, theirs in saved[0].weights.items():
            assert torch.equal(again[0].weights[name], theirs), name
        assert again[0].evaluation == saved[0].evaluation
