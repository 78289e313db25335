"""Optimizers that a loop of one's own hands to ``accelerator.prepare``: bitsandbytes' step in one launch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

import sloth_backend
from integration_tests.hosts.accelerate_runs import make_accelerator, make_batches, make_model, switched, train
from sloth_backend import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_kernels import launch
from sloth_kernels.optimizers import adam, batch
from sloth_plugins import optimizer_step

QUIET = {"print_report": False}


@pytest.fixture(autouse=True)
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one launch computes, on a CPU."""
    if launch.interpreting():
        return

    def update(self: batch.Batch, grads: Sequence[torch.Tensor], hyper: adam.Hyper) -> None:
        for p, grad, state in zip(self.params, grads, self.states, strict=True):
            adam.reference(p, grad, state, hyper)

    monkeypatch.setattr(optimizer_step, "interpreting", lambda: True)
    monkeypatch.setattr(batch, "runs_triton", lambda *tensors: True)
    monkeypatch.setattr(batch.Batch, "_launch", update)


def make(optimizer: Any = bnb.optim.AdamW8bit) -> tuple[Any, Any, Any]:
    """An accelerator with the backend, a model and its optimizer."""
    accelerator, model = sloth_backend.attach(make_accelerator(), config=QUIET), make_model(lora=True)
    return accelerator, model, optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def found(model: Any) -> list[Finding]:
    return sloth_backend.report(model).of(capability=optimizer_step.CAPABILITY)


def is_ours(optimizer: Any) -> bool:
    step = vars(optimizer).get("step")
    return isinstance(getattr(step, "one_launch", None), optimizer_step.OneLaunch)


@pytest.mark.parametrize("together", [True, False])
def test_it_steps_in_one_launch(together: bool) -> None:
    """Prepared with its model, or after it; the numbers are those of a step that was attached by hand."""
    accelerator, model, optimizer = make()
    if together:
        model, prepared = accelerator.prepare(model, optimizer)
    else:
        model = accelerator.prepare(model)
        prepared = accelerator.prepare(optimizer)
    assert [(f.action, f.subject, f.plugin) for f in found(model)] == [("changed", "AdamW8bit", "optimizer_step")]
    assert is_ours(optimizer)
    losses = train(accelerator, model, prepared, make_batches())
    accelerator, straight, plain = make()
    optimizer_step.attach(plain, Edits())
    straight = sloth_backend.optimize(straight, config=QUIET)
    expected = train(accelerator, straight, plain, make_batches())
    assert losses == expected
    assert losses[-1] != losses[0]


def test_prepared_again_it_is_found_once() -> None:
    accelerator, model, optimizer = make()
    model, prepared = accelerator.prepare(model, optimizer)
    assert accelerator.prepare(prepared) is prepared
    assert len(found(model)) == 1


def test_undone_it_is_bitsandbytes_own() -> None:
    accelerator, model, optimizer = make()
    before = set(vars(optimizer))
    model, _ = accelerator.prepare(model, optimizer)
    sloth_backend.undo(model)
    assert set(vars(optimizer)) == before
    again, _ = accelerator.prepare(make_model(lora=True), optimizer)
    assert not found(again)  # it trains another model


def test_the_model_does_not_keep_it_alive() -> None:
    accelerator, model, optimizer = make()
    model, prepared = accelerator.prepare(model, optimizer)
    alive = weakref.ref(optimizer)
    del optimizer, prepared
    accelerator.free_memory()
    gc.collect()
    assert alive() is None
    sloth_backend.undo(model)


def test_a_failure_of_accelerate_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model, optimizer = make()

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("as told")

    monkeypatch.setattr(Accelerator, "prepare_optimizer", fail)
    before = set(vars(optimizer))
    with pytest.raises(ArithmeticError, match="as told"):
        accelerator.prepare(model, optimizer)
    assert set(vars(optimizer)) == before


def test_others_are_told_why_not() -> None:
    accelerator, model, optimizer = make(torch.optim.AdamW)
    model, _ = accelerator.prepare(model, optimizer)
    (finding,) = found(model)
    assert (finding.action, finding.subject) == ("skipped", "AdamW")
    assert "fused=True" in finding.reason
    assert "step" not in vars(optimizer)


def test_sharded_parameters_are_bitsandbytes_own() -> None:
    _, _, optimizer = make()
    run = Run("accelerate", SlothConfig(), sharding="fsdp2")
    (finding,) = optimizer_step.sloth_patch_optimizer(optimizer, run, Edits())
    assert (finding.action, finding.subject) == ("skipped", "AdamW8bit")
    assert not is_ours(optimizer)


def test_a_trainer_sees_to_its_own(tmp_path: Path) -> None:
    from integration_tests.hosts.trl_runs import make_args, make_trainer

    with switched('{"print_report": false}'):
        trainer = make_trainer(tmp_path, args=make_args(tmp_path, optim="adamw_bnb_8bit", max_steps=1))
        trainer.train()
    assert [f.action for f in found(trainer.model)] == ["changed"]
