"""Calls that a program does not follow go to the layer's own forward, call by call."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from integration_tests.plugins.layer_programs.common import adapted, assert_same, llama, train, twins
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_backend.plan import MemoryPlan
from sloth_plugins.kernel_patching.modules import CAPTURING, captures
from sloth_plugins.layer_programs.costs import Shape
from sloth_plugins.layer_programs.planner import Planner

LAYERS = 3


def layer_of(model: Any, index: int) -> Any:
    return model.base_model.model.model.layers[index]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_generation(name: str) -> None:
    """Greedy, with a cache, from a padded batch."""
    mine, stock = twins(adapted(make_model(name)))
    ids, mask = (make_batches()[0][key].flip(1) for key in ("input_ids", "attention_mask"))
    texts = [
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for model in (mine, stock)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape[1] > ids.shape[1]


def test_a_filled_cache_in_training_mode(runs: list[Call]) -> None:
    """Its keys and values are read: the second half of a row sees the first."""
    mine, stock = twins(llama())
    ids = make_batches()[0]["input_ids"]
    results = []
    for model in (mine, stock):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :9], use_cache=True).past_key_values
        results.append(train(model, [{"input_ids": ids[:, 9:], "labels": ids[:, 9:]}], past_key_values=cache))
    assert_same(*results)
    assert not runs


def test_attention_probabilities(runs: list[Call]) -> None:
    mine, stock = twins(llama())
    ours, theirs = (model(**make_batches()[0], output_attentions=True) for model in (mine, stock))
    assert not runs
    assert len(ours.attentions) == LAYERS
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a, b)


def test_hidden_states() -> None:
    mine, stock = twins(llama())
    ours, theirs = (model(**make_batches()[0], output_hidden_states=True) for model in (mine, stock))
    assert len(ours.hidden_states) == LAYERS + 1
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def captured(model: Any, asked: str, by_config: bool = False) -> list[torch.Tensor]:
    """What a call gives that asks for ``attentions`` or ``hidden_states``, by an argument or by the configuration."""
    own, name = model.get_base_model(), f"output_{asked}"  # PEFT would hand on that nothing is asked for
    setattr(own.config, name, by_config)
    found = getattr(own(**make_batches()[0], **({} if by_config else {name: True})), asked)
    setattr(own.config, name, False)
    return list(found)


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("asked", ["attentions", "hidden_states"])
@pytest.mark.parametrize("before", [False, True])
def test_a_call_that_captures_leaves_the_next_ones_programs(
    before: bool, asked: str, by_config: bool, runs: list[Call]
) -> None:
    """transformers' hooks stay where they are, and do nothing where nobody asks."""
    model = llama()
    if before:
        captured(model, asked)
    mine, stock = twins(model)
    for passes in (0, 3, 6):
        assert len(runs) == passes * LAYERS
        ours, theirs = (captured(each, asked, by_config) for each in (mine, stock))
        assert len(runs) == passes * LAYERS
        assert len(ours) == len(theirs) >= LAYERS
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert_same(train(mine), train(stock))


def test_a_hook_beside_those_that_capture_is_called(runs: list[Call]) -> None:
    mine, _ = twins(llama())
    captured(mine, "attentions")
    heard: list[str] = []
    layer_of(mine, 1).self_attn.register_forward_hook(lambda *args: heard.append("attention"))
    train(mine, make_batches(1))
    assert heard == ["attention"]
    assert len(runs) == LAYERS - 1


def test_hooks_of_another_transformers_may_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not captures()
    monkeypatch.setitem(sys.modules, CAPTURING, types.ModuleType(CAPTURING))
    assert captures()


def test_an_argument_that_only_a_head_reads_is_no_obstacle(runs: list[Call]) -> None:
    """TRL's distillation hands it to the decoder, which hands it to every layer."""
    mine, stock = twins(llama())
    ids = make_batches()[0]["input_ids"]
    decoders = [model.get_base_model().model for model in (mine, stock)]
    ours, theirs = (decoder(input_ids=ids, logits_to_keep=3).last_hidden_state for decoder in decoders)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(runs) == LAYERS


HOOKED = ["self_attn", "mlp.gate_proj", "self_attn.o_proj.lora_A.default", "input_layernorm"]


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize("child", HOOKED)
def test_hooks_inside_a_layer_are_called(child: str, index: int, runs: list[Call]) -> None:
    """The other layers stay programs, also behind a first layer that fills the cache of a model that trains."""
    mine, stock = twins(llama())
    heard: dict[str, list[str]] = {"mine": [], "stock": []}
    handles = []
    for name, model in (("mine", mine), ("stock", stock)):
        module = layer_of(model, index).get_submodule(child)
        handles.append(module.register_forward_hook(lambda *args, own=heard[name]: own.append("forward")))
        handles.append(module.register_full_backward_hook(lambda *args, own=heard[name]: own.append("backward")))
    batch = make_batches(1)
    expected = train(stock, batch)
    assert_same(train(mine, batch), expected)
    assert heard["mine"] == heard["stock"] != []
    assert len(runs) == LAYERS - 1
    for handle in handles:
        handle.remove()
    assert_same(train(mine, batch), expected)
    assert heard["mine"] == heard["stock"]
    assert len(runs) == 2 * LAYERS - 1


def test_every_length_is_planned_while_the_first_layer_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = twins(llama())
    layer_of(mine, 0).mlp.register_forward_hook(lambda *args: None)
    tokens: list[int] = []
    original = Planner.planned

    def noted(self: Planner, shape: Shape, device: torch.device) -> MemoryPlan:
        tokens.append(shape.tokens)
        return original(self, shape, device)

    monkeypatch.setattr(Planner, "planned", noted)
    train(mine, [*make_batches(1, length=17), *make_batches(1, length=40)], use_cache=False)
    assert tokens == [2 * 17, 2 * 40]


def test_hooks_on_a_layer_leave_it_a_program(runs: list[Call]) -> None:
    mine, _ = twins(llama())
    shapes: list[Any] = []
    layer_of(mine, 1).register_forward_hook(lambda layer, args, output: shapes.append(output.shape))
    train(mine, make_batches(1))
    assert shapes == [(2, 17, 48)]
    assert len(runs) == LAYERS


def test_unknown_arguments(runs: list[Call]) -> None:
    mine, stock = twins(llama())
    assert_same(train(mine, flavour="sour"), train(stock, flavour="sour"))
    assert not runs


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


@contextmanager
def _merged(model: Any) -> Iterator[None]:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@pytest.mark.parametrize("state", [_disabled, _merged])
def test_adapters_out_of_the_way(state: Callable[[Any], Any], runs: list[Call]) -> None:
    mine, stock = twins(llama())
    logits = []
    for model in (mine, stock):
        with state(model), torch.no_grad():
            logits.append(model(**make_batches()[0]).logits)
    assert not runs
    torch.testing.assert_close(*logits)
    assert_same(train(mine), train(stock))
    assert len(runs) == LAYERS * len(make_batches())


def test_adapters_are_switched_while_it_runs(runs: list[Call]) -> None:
    mine, stock = twins(llama())
    before = train(mine)
    for model in (mine, stock):
        torch.manual_seed(7)
        model.add_adapter("second", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if "second" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.set_adapter("second")
    after = train(mine)
    assert_same(after, train(stock))
    assert not torch.allclose(before["loss"], after["loss"])
    assert len(runs) == 2 * LAYERS * len(make_batches())
