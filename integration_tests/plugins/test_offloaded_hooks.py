"""Offloaded checkpointing as a plugin: its plan, its findings, undo, and models that are copied."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

import sloth_plugins.offloaded_checkpointing as plugin
from integration_tests import tiny
from integration_tests.plugins.lazy_device import LazyDevice
from integration_tests.plugins.offloading import Forced, batch, forced, make_llama, train
from sloth_backend import SlothConfig, optimize, report, undo
from sloth_backend.findings import Edits, Finding
from sloth_backend.plan import KEEP, OFFLOAD, RECOMPUTE, Level, MemoryPlan
from sloth_backend.run import Run
from sloth_plugins.offloaded_checkpointing.seam import FUNCTION, LayerCheckpoint
from sloth_plugins.program_layers import mark


def describe(model: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of every module; hooks by their number alone, since torch counts them through the process."""
    found = tiny.describe(model)
    return {
        name: {key: len(value) if "_hooks" in key and value is not None else value for key, value in facts.items()}
        for name, facts in found.items()
    }


def test_undo_restores_every_attribute_and_the_memory() -> None:
    for early, late in ((True, False), (False, True), (True, True)):
        model, twin = make_llama(), make_llama()
        for each in (model, twin):
            each.gradient_checkpointing_enable({"use_reentrant": True}) if early else None
        assert describe(model) == describe(twin)
        ring = Forced(model)
        if late:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch()).loss
        assert plugin.host_bytes(model) == sum(ring.device.pinned.values()) > 0
        ring.edits.rollback()
        assert describe(model) == describe(twin)
        functions = {name: vars(m).get(FUNCTION) for name, m in model.named_modules()}
        assert not any(isinstance(function, LayerCheckpoint) for function in functions.values())
        assert functions["model.layers.0"] is functions["model"]
        loss.backward()
        device = ring.device
        del loss, ring
        assert not device.pinned
        assert not device.violations


def test_disabling_checkpointing_leaves_the_hosts_function() -> None:
    model = make_llama()
    with forced(model) as ring:
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()
        assert not any(isinstance(vars(m)[FUNCTION], LayerCheckpoint) for m in model.model.layers)
        train(model, [batch()])
    assert ring.device.copies["outward"] == 0


def test_a_copied_or_pickled_model_is_a_stock_model() -> None:
    model = make_llama()
    ring = Forced(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    function = vars(model.model.layers[0])[FUNCTION]
    assert pickle.loads(pickle.dumps(function)).keywords == function.host.keywords == {"use_reentrant": False}
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": True})
    assert vars(other.model.layers[0])[FUNCTION].keywords == {"use_reentrant": True}
    train(other, [batch()])
    assert ring.device.copies["outward"] == 0
    ring.edits.rollback()
    other.gradient_checkpointing_enable()
    assert not isinstance(vars(model.model.layers[0])[FUNCTION], LayerCheckpoint)


def test_a_model_that_is_dropped_takes_its_memory_along() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    ring = Forced(model)
    train(model, [batch()])
    device = ring.device
    assert device.pinned
    del model, ring
    gc.collect()
    assert not device.pinned


def make_run(device: str = "cuda", gradient_checkpointing: bool | None = True, **options: Any) -> Run:
    return Run("user", SlothConfig(**options), torch.device(device), gradient_checkpointing=gradient_checkpointing)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LazyDevice:
    """Stands in for every CUDA device."""
    device = LazyDevice()
    monkeypatch.setattr(plugin, "CudaDevice", lambda _: device)
    return device


def subjects(findings: list[Finding], action: str) -> list[str]:
    return [finding.subject for finding in findings if finding.action == action]


@pytest.mark.parametrize(("keep", "offloaded"), [(1, 3), (0, 4), (3, 1)])
def test_without_a_plan_all_but_the_last_are_offloaded(device: LazyDevice, keep: int, offloaded: int) -> None:
    findings = plugin.sloth_patch_model(make_llama(), make_run(offload_keep_last=keep), None, Edits())
    assert subjects(findings, "changed") == [f"model.layers.{n}" for n in range(offloaded)]
    assert subjects(findings, "skipped") == [f"model.layers.{n}" for n in range(offloaded, 4)]


def test_layers_that_run_as_programs_are_left_alone(device: LazyDevice) -> None:
    for plan, changed in ((None, [1]), (MemoryPlan((OFFLOAD, RECOMPUTE, OFFLOAD, OFFLOAD)), [3])):
        model, edits = make_llama(), Edits()
        model.gradient_checkpointing_enable()
        for n in (0, 2):
            mark(model.model.layers[n], edits)
        findings = plugin.sloth_patch_model(model, make_run(), plan, edits)
        assert {finding.subject for finding in findings} == {"model.layers.1", "model.layers.3"}
        assert subjects(findings, "changed") == [f"model.layers.{n}" for n in changed]
        model.gradient_checkpointing_enable()
        wrapped = [isinstance(vars(layer)[FUNCTION], LayerCheckpoint) for layer in model.model.layers]
        assert wrapped == [False, True, False, True]


def test_where_all_layers_run_as_programs_one_finding_says_so(device: LazyDevice) -> None:
    model, edits = make_llama(), Edits()
    for layer in model.model.layers:
        mark(layer, edits)
    (finding,) = plugin.sloth_patch_model(model, make_run(), None, edits)
    assert "every layer runs as a program" in finding.reason
    assert "_set_gradient_checkpointing" not in vars(model)


@pytest.mark.parametrize(
    ("run", "plan", "reason"),
    [
        (make_run("cpu"), None, "the model is on cpu"),
        (make_run(checkpointing="host"), None, "checkpointing='host'"),
        (make_run(gradient_checkpointing=False), None, "the host does not checkpoint"),
        (make_run(offload_keep_last=9), None, "offloads no layer: 4 recompute"),
        (make_run(), MemoryPlan((OFFLOAD,) * 3), "has 3 layers, the model 4"),
        (make_run(), MemoryPlan((RECOMPUTE,) * 4), "offloads no layer: 4 recompute"),
    ],
)
def test_steps_aside_with_one_finding(run: Run, plan: MemoryPlan | None, reason: str) -> None:
    model, twin = make_llama(), make_llama()
    (finding,) = plugin.sloth_patch_model(model, run, plan, Edits())
    assert (finding.action, finding.capability) == ("skipped", "offloaded_checkpointing")
    assert reason in finding.reason
    assert tiny.describe(model) == tiny.describe(twin)


def test_steps_aside_for_models_that_do_not_checkpoint() -> None:
    class Old(torch.nn.Module):
        pass

    (finding,) = plugin.sloth_patch_model(Old(), make_run(), MemoryPlan(()), Edits())
    assert "no layer of this model checkpoints" in finding.reason


def test_optimize_on_a_cpu_says_why_it_does_nothing() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    optimize(model, config=SlothConfig(kernels=False, print_report=False))
    (finding,) = report(model).of(capability="offloaded_checkpointing")
    assert (finding.action, finding.plugin) == ("skipped", "offloaded_checkpointing")
    assert "the model is on cpu" in finding.reason
    undo(model)


@pytest.mark.parametrize("refuses", [False, True])
def test_findings_where_it_takes_effect(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    device = LazyDevice(refuses_to_pin=refuses)
    monkeypatch.setattr(plugin, "CudaDevice", lambda _: device)
    model, run, edits = make_llama(), make_run(), Edits()
    findings = plugin.sloth_patch_model(model, run, None, edits)
    assert [f.subject for f in findings if f.action == "changed"] == [f"model.layers.{n}" for n in range(3)]
    assert [f.subject for f in findings if f.action == "skipped"] == ["model.layers.3"]
    assert [f.subject for f in findings if f.action == "warned"] == ["host memory"] * refuses
    assert not device.pinned
    edits.rollback()
    assert "_set_gradient_checkpointing" not in vars(model)


def test_layers_of_other_levels_are_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "CudaDevice", lambda _: LazyDevice())
    model, edits = make_llama(), Edits()
    model.gradient_checkpointing_enable()
    host = [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers]
    plan = MemoryPlan((OFFLOAD, KEEP, Level("keep without norms"), RECOMPUTE))
    findings = plugin.sloth_patch_model(model, make_run(), plan, edits)
    assert [f.action for f in findings] == ["changed", "skipped", "skipped", "skipped"]
    now = [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers]
    assert [mine is theirs for mine, theirs in zip(now, host, strict=True)] == [False, True, True, False]
    edits.rollback()
