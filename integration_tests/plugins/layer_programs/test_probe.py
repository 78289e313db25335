"""A layer with all the right parts, wired in another way, is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from integration_tests.plugins.layer_programs.common import (
    WHOLE_BLOCKS,
    adapted,
    assert_same,
    programs,
    quantised,
    reasons,
    switched_on,
    train,
)
from integration_tests.sameness.architectures import make_model
from sloth_kernels.program import Program
from sloth_plugins.layer_programs.probe import Seen, disagreement

Branch = Callable[[torch.Tensor], torch.Tensor]
Wiring = Callable[[Any, torch.Tensor, Branch], Any]


def _as_llama(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    x = x + attend(layer.input_layernorm(x))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _scaled_residual(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    x = 1.1 * x + attend(layer.input_layernorm(x))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _swapped_norms(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    x = x + attend(layer.post_attention_layernorm(x))
    return x + layer.mlp(layer.input_layernorm(x))


def _without_mlp(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    return x + attend(layer.input_layernorm(x))


def _in_parallel(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    return x + attend(layer.input_layernorm(x)) + layer.mlp(layer.post_attention_layernorm(x))


def _norms_after(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    x = x + layer.input_layernorm(attend(x))
    return x + layer.post_attention_layernorm(layer.mlp(x))


def _a_little_more(layer: Any, x: torch.Tensor, attend: Branch) -> Any:
    x = x + 1.01 * attend(layer.input_layernorm(x))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def rewired(wiring: Wiring, layer: LlamaDecoderLayer) -> None:
    """Make ``layer`` one of a class whose forward is ``wiring``."""

    class Rewired(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return wiring(self, hidden_states, lambda n: self.self_attn(hidden_states=n, **kwargs)[0])

    layer.__class__ = Rewired


def model_with(wiring: Wiring, index: int) -> Any:
    """A tiny Llama under LoRA one of whose layers is wired so."""
    model = make_model("llama")
    rewired(wiring, model.model.layers[index])
    return adapted(model)


def test_the_right_wiring_under_another_name() -> None:
    found = programs(switched_on(model_with(_as_llama, 1)))
    assert [finding.action for finding in found] == ["changed"] * 3


@pytest.mark.parametrize(
    "wiring", [_scaled_residual, _swapped_norms, _without_mlp, _in_parallel, _norms_after, _a_little_more]
)
@pytest.mark.parametrize("index", [0, 2])
def test_another_wiring_is_refused(wiring: Wiring, index: int) -> None:
    mine = switched_on(model_with(wiring, index))
    found = programs(mine)
    assert [i for i, finding in enumerate(found) if finding.action == "skipped"] == [index]
    assert "more than the" in found[index].reason
    assert_same(train(mine.train()), train(model_with(wiring, index).train()))


@pytest.mark.parametrize(
    "wiring", [_as_llama, _scaled_residual, _swapped_norms, _without_mlp, _in_parallel, _norms_after]
)
def test_coarse_products_do_not_hide_another_wiring(wiring: Wiring) -> None:
    """4-bit weights whose products are rounded to bfloat16, between states in float32."""
    model = quantised(make_model("llama", **WHOLE_BLOCKS), compute_dtype=torch.bfloat16)
    for name, norm in model.named_modules():
        if "norm" in name:
            norm.weight.data = torch.rand_like(norm.weight) + 0.5
    rewired(wiring, model.model.layers[1])
    found = programs(switched_on(adapted(model)))
    assert [finding.action for finding in found] == ["changed", "changed" if wiring is _as_llama else "skipped"] + [
        "changed"
    ] * (len(found) - 2)


@pytest.mark.parametrize(
    ("kwargs", "output", "reason"),
    [
        ({}, (torch.zeros(1, 2, 4),), "it returns a tuple, not one tensor"),
        ({"flavour": 1}, torch.zeros(1, 2, 4), "arguments that programs do not know: flavour"),
    ],
    ids=["tuple", "argument"],
)
def test_another_kind_of_call_is_refused(kwargs: dict[str, Any], output: Any, reason: str) -> None:
    seen = Seen(torch.zeros(1, 2, 4), kwargs, output, torch.ones(1, 2, dtype=torch.bool))
    assert reason in disagreement(Program([]), torch.nn.Identity(), [seen])
    assert "positional argument" in disagreement(Program([]), torch.nn.Identity(), [])


@pytest.mark.parametrize("training", [False, True])
def test_weights_in_4_bits_are_not_packed_for_this_cpu(training: bool) -> None:
    model = adapted(quantised(make_model("llama", **WHOLE_BLOCKS))).train(training)
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = True
    before = [linear.weight.detach().clone() for linear in linears]
    assert programs(switched_on(model))
    assert not any(vars(linear.weight.quant_state).get("packing_format_for_cpu") for linear in linears)
    assert all(torch.equal(linear.weight, packed) for linear, packed in zip(linears, before, strict=True))
    assert all(module.training is training for module in model.modules())


def in_8bit(model: Any) -> list[Any]:
    """The linears of ``model``'s layers, now in bitsandbytes' 8 bits, which nobody has called yet."""
    layers, found = model.model.layers, []
    for name, linear in [*layers.named_modules()]:
        if isinstance(linear, torch.nn.Linear):
            packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
            packed.load_state_dict({"weight": linear.weight.detach(), "bias": torch.zeros(linear.out_features)})
            parent, _, child = name.rpartition(".")
            setattr(layers.get_submodule(parent), child, packed.to("cpu"))
            found.append(packed)
    model.is_loaded_in_8bit = True
    return found


def test_linears_of_8_bits_are_as_if_nobody_had_called_them() -> None:
    """Where their scales have left the weight, ``model.to(device)`` leaves them behind on the device they were on."""
    model = make_model("llama").requires_grad_(False).to(torch.bfloat16)
    linears = in_8bit(model)
    before = [(linear.weight.CB, linear.weight.SCB, linear.weight.data_ptr()) for linear in linears]
    biases = {linear.bias.dtype for linear in linears}
    assert all(CB is not None for CB, _, _ in before)
    switched_on(adapted(model))
    for linear, (CB, SCB, at) in zip(linears, before, strict=True):
        assert linear.weight.CB is CB
        assert linear.weight.SCB is SCB
        assert linear.weight.data_ptr() == at
        assert linear.state.CB is None
        assert linear.state.SCB is None
    assert {linear.bias.dtype for linear in linears} == biases


@pytest.mark.parametrize("part", ["CB", "SCB"])
def test_weights_that_were_moved_without_their_scales_are_not_asked(part: str) -> None:
    model = make_model("llama").requires_grad_(False).to(torch.bfloat16)
    linear = in_8bit(model)[0]
    setattr(linear.weight, part, getattr(linear.weight, part).to("meta"))
    found = reasons(switched_on(adapted(model)))
    assert len(found) == 1
    assert "has its weight on cpu, what belongs to it on meta" in found.pop()
