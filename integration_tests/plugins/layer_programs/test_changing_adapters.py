"""What is kept from call to call follows the adapters, whatever changes them and whatever sign that leaves."""

from __future__ import annotations

from typing import Any

import torch

from integration_tests.plugins.layer_programs.common import WHOLE_BLOCKS, assert_same, quantised, switched_on, train
from integration_tests.plugins.layer_programs.common import adapted as with_adapters
from integration_tests.sameness.architectures import make_batches, make_model
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
