"""DDP and FSDP2 on two GPUs, NCCL between them: the losses and weights of one GPU at the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch
from integration_tests.several_gpus.same import assert_close, assert_equal_in_all_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]
METHODS = ["full", "lora", "qlora"]
HOSTS = ["loop", "sft"]
COMMON: dict[str, Any] = {"device": "cuda", "steps": 4}
RELATIVE = 1e-4
"""Of losses and weights in float32: other kernels sum in other orders."""


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every strategy, method and host, with the backend and without, in one pair of processes."""
    cases = [
        Case(f"{strategy} {method} {host} {backend}", host, strategy, method, backend, **COMMON)
        for strategy in ("ddp", "fsdp2")
        for method in METHODS
        for host in HOSTS
        for backend in (True, False)
    ]
    return launch(cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """The same on one GPU, which takes twice as many passes for a step."""
    cases = [
        Case(f"{method} {host}", host, "ddp", method, accumulation=4, **COMMON) for method in METHODS for host in HOSTS
    ]
    return launch(cases, tmp_path_factory.mktemp("one"), processes=1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_gpus_have_the_numbers_of_one_and_of_stock(
    strategy: str, method: str, host: str, on_two: dict[str, list[Outcome]], on_one: dict[str, list[Outcome]]
) -> None:
    ours, stock = (on_two[f"{strategy} {method} {host} {backend}"] for backend in (True, False))
    one = on_one[f"{method} {host}"][0]
    assert ours[0].changed("layer_program")
    assert not ours[0].reasons("skipped", "layer_program")
    assert ours[0].losses == pytest.approx(stock[0].losses, rel=RELATIVE)
    if host == "sft":  # a loop reports each batch of its own
        assert ours[0].losses == pytest.approx(one.losses, rel=RELATIVE)
    assert_close(ours[0].weights, stock[0].weights, RELATIVE)
    assert_close(ours[0].weights, one.weights, RELATIVE)
    assert_equal_in_all_processes(ours)


def test_a_gpu_that_runs_out_of_memory_holds_nobody_up(tmp_path: Path) -> None:
    common = {"host": "sft", "strategy": "fsdp2", "method": "qlora", **COMMON}
    found = launch([Case("short", short_of_memory=1, **common), Case("stock", backend=False, **common)], tmp_path)
    assert found["short"][0].losses == pytest.approx(found["stock"][0].losses, rel=RELATIVE)
    assert_equal_in_all_processes(found["short"])
