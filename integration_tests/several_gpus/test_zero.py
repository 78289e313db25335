"""DeepSpeed's ZeRO on two processes: the losses and weights of stock, and runs that go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration_tests.several_gpus.cases import Case
from integration_tests.several_gpus.launching import Outcome, launch
from integration_tests.several_gpus.same import assert_close, assert_equal_in_all_processes, assert_same
from integration_tests.several_gpus.zero import stage_of
from sloth_backend.run import REASON_BY_MODULE

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
RUNS: dict[str, dict[str, Any]] = {
    "zero-1, loop, qlora": {"strategy": "zero-1", "method": "qlora"},
    "zero-1, trainer, full": {"strategy": "zero-1", "host": "trainer"},
    "zero-2, sft, qlora": {"strategy": "zero-2", "host": "sft", "method": "qlora"},
    "zero-3, loop, qlora": {"strategy": "zero-3", "method": "qlora"},
    "zero-3, trainer, lora": {"strategy": "zero-3", "host": "trainer", "method": "lora"},
    "zero-3, sft, full": {"strategy": "zero-3", "host": "sft", "loaded": True},
}
# Adam has states that must come back, where SGD without momentum has none.
SAVED: dict[str, Any] = {
    "host": "sft",
    "method": "lora",
    "steps": 4,
    "options": {"optim": "adamw_torch", "learning_rate": 1e-2},
}
SAVE_AT = 2
STAGES = ["zero-1", "zero-2", "zero-3"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """All runs that are compared with stock, in one pair of processes."""
    runs = [
        Case(f"{name}, {'ours' if backend else 'stock'}", backend=backend, steps=2, **run)
        for name, run in RUNS.items()
        for backend in (True, False)
    ]
    return launch(runs, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, list[Outcome]]:
    """All runs that save, and that go on."""
    runs = []
    for stage in STAGES:
        ours = Case(stage, strategy=stage, save_at=SAVE_AT, **SAVED)
        stock = Case(f"{stage}, stock", strategy=stage, save_at=SAVE_AT, backend=False, **SAVED)
        checkpoint = str(folder / stage / f"checkpoint-{SAVE_AT}")
        runs += [ours, stock, Case(f"{stage}, resumed", strategy=stage, resume=checkpoint, **SAVED)]
    return launch(runs, folder)


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_stock(name: str, found: dict[str, list[Outcome]]) -> None:
    for ours, stock in zip(found[f"{name}, ours"], found[f"{name}, stock"], strict=True):
        assert_same(ours, stock)
    assert_equal_in_all_processes(found[f"{name}, ours"])


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_and_what_steps_aside(name: str, found: dict[str, list[Outcome]]) -> None:
    ours = found[f"{name}, ours"][0]
    by_module = stage_of(RUNS[name]["strategy"]) == 3
    for capability in ("layer_program", "linear_cross_entropy"):
        assert bool(ours.changed(capability)) != by_module
        assert set(ours.reasons("skipped", capability)) == ({REASON_BY_MODULE} if by_module else set())
    assert len(ours.changed("rms_norm")) == 5
    assert not ours.changed("batch_fusion")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(stage: str, saved: dict[str, list[Outcome]]) -> None:
    for whole, resumed in zip(saved[stage], saved[f"{stage}, resumed"], strict=True):
        assert len(resumed.losses) == SAVED["steps"]
        assert resumed.losses == whole.losses
        assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    assert_equal_in_all_processes(saved[f"{stage}, resumed"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_adapters_are_those_of_stock(stage: str, saved: dict[str, list[Outcome]], folder: Path) -> None:
    assert saved[stage][0].losses == pytest.approx(saved[f"{stage}, stock"][0].losses, rel=1e-5)
    names = (stage, f"{stage}, stock")
    ours, stock = (load_file(folder / n / f"checkpoint-{SAVE_AT}" / "adapter_model.safetensors") for n in names)
    # Adam divides by what is next to nothing at first, which makes more of roundings than SGD.
    assert_close(ours, stock, 1e-4)
