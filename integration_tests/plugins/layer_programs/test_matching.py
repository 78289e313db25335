"""Which layers become programs, and what is said of those that do not."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from integration_tests.plugins.layer_programs.common import (
    WHOLE_BLOCKS,
    adapted,
    assert_same,
    llama,
    programs,
    quantised,
    reasons,
    switched_on,
    takes,
    train,
    twins,
)
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.sameness.architectures import SPECIALS, make_batches, make_model

LAYER_NORMS = {"cohere": "its CohereLayerNorm is no rms_norm that the kernels know"}
"""Architectures without programs, and why."""


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(SPECIALS.keys() - LAYER_NORMS.keys()))
def test_every_layer_is_a_program_that_trains_as_the_layer_does(name: str, attention: str) -> None:
    model = make_model(name)
    if not takes(model, attention):
        pytest.skip(f"transformers has no {attention} for it")
    mine, stock = twins(adapted(model))
    assert len(programs(mine)) == len(model.model.layers)
    assert_same(train(mine), train(stock))


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_other_norms_are_named(name: str) -> None:
    found = reasons(switched_on(adapted(make_model(name))))
    assert len(found) == 1
    assert found.pop().startswith(LAYER_NORMS[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_mode_in_which_the_model_is_patched_does_not_matter(training: bool, dropout: float) -> None:
    assert not reasons(switched_on(llama(lora_dropout=dropout).train(training)))


@pytest.mark.parametrize("options", [{}, {"compress_statistics": False}, {"compute_dtype": torch.float32}], ids=str)
def test_4bit_weights(options: dict[str, Any]) -> None:
    mine, stock = twins(adapted(quantised(make_model("llama", **WHOLE_BLOCKS), **options)))
    assert_same(train(mine), train(stock))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "adapter 'default' is a DoraLinearVariant, not plain LoRA"),
        ({"lora_bias": True}, "adapter 'default' has a bias of its own (lora_bias)"),
    ],
    ids=["dora", "lora_bias"],
)
def test_other_adapters_keep_their_own_forward(options: dict[str, Any], reason: str) -> None:
    assert reasons(switched_on(llama(**options))) == {reason}


EMBEDDINGS: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    {"trainable_token_indices": [3, 5, 7]},
    {"modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("options", EMBEDDINGS, ids=lambda options: next(iter(options)))
def test_an_adapted_embedding_is_no_obstacle(options: dict[str, Any], name: str, runs: list[Call]) -> None:
    """Its adapters train with it; that of ``qwen3`` is the head too."""
    model = adapted(make_model(name), **options)
    for part, parameter in model.named_parameters():
        if "lora_embedding" in part:
            torch.nn.init.normal_(parameter, std=0.05)
    mine, stock = twins(model)
    expected = train(stock)
    assert any("embed" in part for part in expected)
    assert_same(train(mine), expected)
    assert len(runs) == 3 * len(make_batches())


def test_one_odd_linear_keeps_one_layer_from_being_a_program() -> None:
    model = llama(use_dora=True, target_modules=r".*layers\.1\.mlp\.up_proj")
    assert [finding.action for finding in programs(switched_on(model))] == ["changed", "skipped", "changed"]


def test_a_replaced_forward_stays() -> None:
    model = make_model("llama")
    layer = model.model.layers[1]
    layer.forward = types.MethodType(type(layer).forward, layer)
    replaced = vars(layer)["forward"]
    first, second, third = programs(switched_on(model))
    assert (first.action, third.action) == ("changed", "changed")
    assert (second.action, second.subject) == ("skipped", "model.layers.1")
    assert second.reason.startswith("its forward is already replaced, by transformers.")
    assert vars(layer)["forward"] is replaced


def test_other_attention_implementations_run_as_they_are() -> None:
    model = make_model("llama")
    model.set_attn_implementation("flex_attention")
    known = "attn_implementation='flex_attention' runs as it is; programs know sdpa, eager"
    assert reasons(switched_on(model)) == {known}


def test_attention_dropout_is_left_to_the_host() -> None:
    (reason,) = reasons(switched_on(make_model("llama", attention_dropout=0.1)))
    assert reason.startswith("its attention has dropout")


@pytest.mark.parametrize("missing", ["rms_norm", "rope", "glu", "lora", "attention"])
def test_a_program_is_made_of_all_its_ops(missing: str) -> None:
    ops = [name for name in ("rms_norm", "rope", "glu", "lora", "nf4", "attention") if name != missing]
    assert reasons(switched_on(llama(), kernels=ops)) == {f"kernels leave out {missing}"}


def test_a_model_that_does_not_run_is_named() -> None:
    model = make_model("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    (reason,) = reasons(switched_on(model))
    assert reason.startswith("the model does not run on 7 tokens: RuntimeError")
