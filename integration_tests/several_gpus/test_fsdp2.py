"""FSDP2 through accelerate and TRL, on two processes: the losses and weights of stock, all layers as programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch
from integration_tests.several_gpus.same import assert_equal_in_all_processes, assert_same

METHODS = ["full", "lora", "qlora"]
GATHERS = "c10d::_allgather_base_"
SHARDED: dict[str, Any] = {"strategy": "fsdp2", "steps": 2}
HALF: dict[str, Any] = {**SHARDED, "host": "trainer", "options": {"bf16": True}}
SFT = {**SHARDED, "host": "sft", "method": "lora", "counted": True}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """All runs, in one pair of processes: most of the time goes into imports."""
    folder = tmp_path_factory.mktemp("fsdp2")
    cases = [
        Case("ours lora", method="lora", counted=True, save_at=2, **SHARDED),
        Case("stock lora", method="lora", counted=True, backend=False, **SHARDED),
        Case("whole lora", method="lora", backend=False, steps=2),
        Case("again lora", method="lora", strategy="fsdp2", steps=0, resume=str(folder / "ours lora")),
    ]
    for method in ("full", "qlora"):
        cases += [
            Case(f"ours {method}", method=method, save_at=2, **SHARDED),
            Case(f"stock {method}", method=method, backend=False, **SHARDED),
            Case(f"whole {method}", method=method, backend=False, steps=2),
        ]
    cases += [
        Case("again full", strategy="fsdp2", steps=0, resume=str(folder / "ours full")),
        Case("from one process", fsdp={"cpu_ram_efficient_loading": True}, **SHARDED),
        Case("checkpointed", fsdp={"activation_checkpointing": True}, **SHARDED),
        Case("head apart", head_apart=True, **SHARDED),
        Case("sft", **SFT),
        Case("sft stock", backend=False, **SFT),
        Case("half", **HALF),
        Case("half stock", backend=False, **HALF),
    ]
    return launch(cases, folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_stock(method: str, found: dict[str, list[Outcome]]) -> None:
    """Sharded alike, and of a model that every process holds whole."""
    for rank in range(2):
        ours = found[f"ours {method}"][rank]
        assert ours.changed("layer_program")
        assert not ours.reasons("skipped", "layer_program")
        assert ours.changed("linear_cross_entropy") == ["loss"]
        assert_same(ours, found[f"stock {method}"][rank])
        assert_same(ours, found[f"whole {method}"][rank])
    assert_equal_in_all_processes(found[f"ours {method}"])


def test_a_loop_talks_as_often_as_stock(found: dict[str, list[Outcome]]) -> None:
    ours, stock = found["ours lora"][0].collectives, found["stock lora"][0].collectives
    kinds = (GATHERS, "c10d::_reduce_scatter_base_", "c10d::allreduce_")
    assert all(ours[kind] == stock[kind] > 0 for kind in kinds)


def test_sft_gathers_once_a_step(found: dict[str, list[Outcome]]) -> None:
    """The micro-batches of a step pass together, where stock gathers parameters anew for each of them."""
    for ours, stock in zip(found["sft"], found["sft stock"], strict=True):
        assert ours.changed("batch_fusion") == ["micro-batches"]
        assert_same(ours, stock)
        assert 0 < ours.collectives[GATHERS] < stock.collectives[GATHERS]


def test_a_trainer_in_bfloat16(found: dict[str, list[Outcome]]) -> None:
    """FSDP2 casts what a model returns: losses, and logits that nobody has computed."""
    ours, stock = found["half"], found["half stock"]
    assert len(ours[0].changed("layer_program")) == 2
    assert ours[0].losses == pytest.approx(stock[0].losses, rel=2**-7)
    assert_equal_in_all_processes(ours)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_saved_comes_back(method: str, found: dict[str, list[Outcome]]) -> None:
    saved, again = found[f"ours {method}"][0], found[f"again {method}"][0]
    assert again.evaluation == saved.evaluation
    for name, weight in saved.weights.items():
        assert torch.equal(again.weights[name], weight), name


def test_weights_that_one_process_hands_out(found: dict[str, list[Outcome]]) -> None:
    assert_same(found["from one process"][0], found["stock full"][0])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_keeps_a_whole_weight_once_it_is_sharded(method: str, found: dict[str, list[Outcome]]) -> None:
    """Before the first pass, which is where the memory plan looks at what is left of the device."""
    assert found[f"stock {method}"][0].held == found[f"ours {method}"][0].held == []


def test_a_head_that_is_gathered_by_itself(found: dict[str, list[Outcome]]) -> None:
    """It stays until its backward, so that logits are put off as ever, and its gradient is reduced."""
    assert found["head apart"][0].logits == "LazyLogits"
    assert_same(found["head apart"][0], found["stock full"][0])


def test_layers_are_not_checkpointed_again(found: dict[str, list[Outcome]]) -> None:
    ours = found["checkpointed"][0]
    assert ours.reasons("changed", "sharding")[0].startswith("FSDP's activation_checkpointing is left out")
    assert_same(ours, found["stock full"][0])
