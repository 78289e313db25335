"""DeepSpeed's ZeRO on two GPUs, NCCL between them: the losses and weights of stock under the same launcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch
from integration_tests.several_gpus.same import assert_as_near, assert_close, assert_equal_in_all_processes
from integration_tests.several_gpus.zero import stage_of

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]
RUNS: dict[str, dict[str, Any]] = {
    "zero-1, trainer, full": {"strategy": "zero-1", "host": "trainer"},
    "zero-2, loop, qlora": {"strategy": "zero-2", "method": "qlora"},
    "zero-2, sft, lora": {"strategy": "zero-2", "host": "sft", "method": "lora"},
    "zero-3, loop, qlora": {"strategy": "zero-3", "method": "qlora"},
    "zero-3, sft, full": {"strategy": "zero-3", "host": "sft", "loaded": True},
}
HALVES: dict[str, dict[str, Any]] = {
    "zero-2, sft, lora": {"options": {"bf16": True}, **RUNS["zero-2, sft, lora"]},
    "zero-3, sft, full": {"options": {"bf16": True}, **RUNS["zero-3, sft, full"]},
}
COMMON: dict[str, Any] = {"device": "cuda", "steps": 3}
RELATIVE, HALF = 1e-4, 2**-8
"""Of losses and weights in float32, since other kernels sum in other orders; and what a loss in bfloat16 may be further
off float32 than stock's, of itself, since it is handed out in bfloat16."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """All runs, in one pair of processes."""
    runs = {**RUNS, **{f"{name}, half": run for name, run in HALVES.items()}}
    cases = [
        Case(f"{name}, {'ours' if backend else 'stock'}", backend=backend, **run, **COMMON)
        for name, run in runs.items()
        for backend in (True, False)
    ]
    return launch(cases, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_stock(name: str, found: dict[str, list[Outcome]]) -> None:
    ours, stock = found[f"{name}, ours"][0], found[f"{name}, stock"][0]
    assert bool(ours.changed("layer_program")) == (stage_of(RUNS[name]["strategy"]) < 3)
    assert ours.changed("rms_norm")
    assert ours.losses == pytest.approx(stock.losses, rel=RELATIVE)
    assert_close(ours.weights, stock.weights, RELATIVE)
    assert_equal_in_all_processes(found[f"{name}, ours"])


@pytest.mark.parametrize("name", HALVES)
def test_bfloat16_stays_within_stock_s_distance_to_float32(name: str, found: dict[str, list[Outcome]]) -> None:
    exact, stock, ours = (found[f"{name}, {run}"][0] for run in ("stock", "half, stock", "half, ours"))
    assert_as_near(ours, stock, exact, HALF)
    assert_equal_in_all_processes(found[f"{name}, half, ours"])
