"""DDP on two processes: the weights of one process at the same global batch, and of stock under the same launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration_tests.hosts.trl_runs import OWN_HEAD
from integration_tests.several_gpus import cases
from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch
from integration_tests.several_gpus.same import assert_equal_in_all_processes, assert_same

STEPS = {"steps": 2}
HOSTS = ["loop", "sft", "trainer"]
METHODS = {"loop": "qlora", "sft": "lora", "trainer": "full"}
UNEQUAL: dict[str, Any] = {"host": "sft", "method": "lora", "lengths": [1, 1, 9, 9, 1, 9, 9, 1], **STEPS}
REDUCES = "c10d::allreduce_"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """All runs, in one pair of processes: most of the time goes into imports."""
    runs = []
    for host, method in METHODS.items():
        counted = host == "trainer"
        runs += [
            Case(f"ours {host}", host=host, method=method, counted=counted, **STEPS),
            Case(f"stock {host}", host=host, method=method, counted=counted, backend=False, **STEPS),
        ]
    runs += [
        Case("sft full", host="sft", **STEPS),
        Case("sft full stock", host="sft", backend=False, **STEPS),
        Case("unequal", config={"memory": "least"}, **UNEQUAL),
        Case("unequal stock", backend=False, **UNEQUAL),
        Case("short of memory", short_of_memory=1, **UNEQUAL),
    ]
    return launch(runs, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("host", HOSTS)
def test_the_numbers_are_those_of_stock(host: str, found: dict[str, list[Outcome]]) -> None:
    for ours, stock in zip(found[f"ours {host}"], found[f"stock {host}"], strict=True):
        assert ours.changed("layer_program")
        assert not ours.reasons("skipped", "layer_program")
        assert_same(ours, stock)
    assert_equal_in_all_processes(found[f"ours {host}"])


@pytest.mark.parametrize("host", HOSTS)
def test_one_process_takes_as_many_passes_for_a_step(
    host: str, found: dict[str, list[Outcome]], tmp_path: Path
) -> None:
    case = Case("one", host=host, strategy="none", method=METHODS[host], accumulation=4, **STEPS)
    one = Outcome(**{"evaluation": [], **cases.run(case, tmp_path)})
    assert_same(found[f"ours {host}"][0]._replace(evaluation=one.evaluation), one, losses=host != "loop")


def test_sft_of_a_whole_model(found: dict[str, list[Outcome]]) -> None:
    """DDP looks through the outputs for unused parameters; the logits among them stay put off."""
    for ours, stock in zip(found["sft full"], found["sft full stock"], strict=True):
        assert ours.changed("linear_cross_entropy") == ([] if OWN_HEAD else ["loss"])
        assert_same(ours, stock)


def test_gradients_are_reduced_once_a_step(found: dict[str, list[Outcome]]) -> None:
    """Beside that, the processes agree on a number of passes once a step, and once on passing rows together."""
    ours, stock = found["ours trainer"][0], found["stock trainer"][0]
    assert ours.changed("batch_fusion") == ["micro-batches"]
    assert ours.collectives[REDUCES] == stock.collectives[REDUCES] + STEPS["steps"] + 1


@pytest.mark.parametrize("name", ["unequal", "short of memory"])
def test_processes_that_would_choose_otherwise(name: str, found: dict[str, list[Outcome]]) -> None:
    """Rows of other lengths, or a plan of its own: nobody waits for ever, and the weights are one."""
    for ours, stock in zip(found[name], found["unequal stock"], strict=True):
        assert_same(ours, stock)
    assert_equal_in_all_processes(found[name])


def test_a_process_that_runs_out_of_memory_tightens_its_own_plan(found: dict[str, list[Outcome]]) -> None:
    warned = [outcome.reasons("warned", "memory_plan") for outcome in found["short of memory"]]
    assert not warned[0]
    assert warned[1][0].startswith("out of memory")
