"""What is kept from call to call follows the adapters, whatever changes them and whatever sign that leaves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import sloth_backend
from integration_tests.plugins.layer_programs.common import (
    WHOLE_BLOCKS,
    assert_same,
    llama,
    quantised,
    switched_on,
    train,
)
from integration_tests.plugins.layer_programs.common import adapted as with_adapters
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_backend.findings import Finding
from sloth_plugins.kernel_patching.linears import LiveLinear


def adapted(**options: Any) -> Any:
    """A tiny float32 Llama over NF4 weights under LoRA."""
    return with_adapters(quantised(make_model("llama", **WHOLE_BLOCKS), compute_dtype=torch.float32), **options)


def scaled_without_a_sign(model: Any, factor: float) -> None:
    """Change the adapters as kernels do that write through pointers."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            version = parameter._version
            parameter.data.mul_(factor)
            assert parameter._version == version


def test_a_pass_reads_what_a_raw_optimizer_wrote() -> None:
    mine, stock = switched_on(adapted(), memory="fastest").train(), adapted().train()
    for _ in range(3):
        assert_same(train(mine), train(stock), tolerance=1e-3)
        for model in (mine, stock):
            scaled_without_a_sign(model, 1.5)


def test_evaluation_reads_what_a_raw_optimizer_wrote() -> None:
    mine, stock = switched_on(adapted(), memory="fastest").train(), adapted().train()
    batch = make_batches(1)[0]
    for model in (mine, stock):
        train(model, [batch])
        scaled_without_a_sign(model, 2.0)
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch, use_cache=False).logits for model in (mine, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_linear_is_read_as_the_same_object_until_it_changes() -> None:
    module: Any = adapted().base_model.model.model.layers[0].self_attn.q_proj
    live = LiveLinear.of(module)
    assert isinstance(live, LiveLinear)
    first = live.read()
    scaled_without_a_sign(module, 2.0)
    assert live.read() is first
    weight = module.lora_A["default"].weight
    weight.data = weight.data[:2].clone()
    assert live.read() is not first
    second = live.read()
    module.scaling["default"] = 3.0
    assert live.read().adapters[0].scale == 3.0
    assert second.adapters[0].scale != 3.0
    module.set_adapter([])
    assert not live.read().adapters


# A model that PEFT changes after it was switched on: what programs were made of is no longer what is inside the layers.

LATER: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.1},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]},
]


def replaced(model: Any) -> list[Finding]:
    """What the report says of modules that were replaced."""
    return [f for f in sloth_backend.report(model).of(action="warned") if f.capability == "layer_program"]


@pytest.mark.parametrize("options", LATER, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_adapters_that_come_after_the_switch_train(
    name: str, options: dict[str, Any], runs: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    if name == "phi3" and "target_modules" in options:
        options = {**options, "target_modules": ["o_proj"]}
    mine = with_adapters(switched_on(make_model(name)), **options).train()
    stock = with_adapters(make_model(name), **options).train()
    caplog.set_level(logging.WARNING, "sloth_backend")
    assert_same(train(mine), train(stock))
    assert len(runs) == (2 * len(make_batches()) if "layers_to_transform" in options else 0)
    assert len(replaced(mine)) == 1
    assert [record.getMessage() for record in caplog.records] == [replaced(mine)[0].reason]


@pytest.mark.parametrize("undone", [False, True])
def test_switched_on_again_they_run_as_programs(undone: bool, runs: list[Call]) -> None:
    mine, stock = with_adapters(switched_on(make_model("llama"))).train(), with_adapters(make_model("llama")).train()
    train(mine)
    if undone:
        sloth_backend.undo(mine)
        assert not any("forward" in vars(module) for module in mine.modules())
        assert_same(train(mine), train(stock))
    assert_same(train(switched_on(mine)), train(stock))
    assert not replaced(mine)
    assert len(runs) == 3 * len(make_batches())


def test_adapters_that_are_taken_out_are_not_computed(runs: list[Call]) -> None:
    mine, stock = switched_on(llama()).train(), llama().train()
    train(mine, make_batches(1))
    del runs[:]
    with torch.no_grad():
        ours, theirs = (model.unload()(**make_batches()[0], use_cache=False).logits for model in (mine, stock))
    torch.testing.assert_close(ours, theirs)
    assert not runs


@pytest.mark.parametrize("kernels", [True, ["lora"]], ids=["programs", "linears"])
def test_a_base_that_is_replaced_below_its_adapters(kernels: Any) -> None:
    results = []
    for model in (switched_on(llama(), kernels=kernels).train(), llama().train()):
        linear = model.base_model.model.model.layers[1].self_attn.q_proj
        other = torch.nn.Linear(48, 48, bias=False).requires_grad_(False)
        other.weight.copy_(linear.base_layer.weight.flip(0))
        linear.base_layer = other
        results.append(train(model))
    assert_same(*results)
