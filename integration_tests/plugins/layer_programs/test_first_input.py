"""The gradient of the embedding's output, which hosts ask for and nobody reads, and those who do read it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.utils import output_capturing

import sloth_backend
from integration_tests import tiny
from integration_tests.plugins import offloading
from integration_tests.plugins.layer_programs.common import (
    WHOLE_BLOCKS,
    adapted,
    assert_same,
    llama,
    quantised,
    reasons,
    switched_on,
    train,
    twins,
)
from integration_tests.plugins.layer_programs.conftest import Call
from integration_tests.plugins.layer_programs.test_parking import Parking
from integration_tests.plugins.layer_programs.test_replay import made, transient  # noqa: F401
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_kernels.linears import BoundLinears
from sloth_kernels.stages import _BoundNorm
from sloth_plugins.layer_programs.first_input import FirstInput
from sloth_plugins.layer_programs.replay import SEEN, Replays

LAYERS = 3
FROZEN_INPUT, NORMS = 1, 2 * LAYERS - 1
"""Groups of linears whose backward is asked for no gradient of x, and norms that run backward, for a pass in which
nobody reads the first input's gradient."""
BATCH = make_batches(1)


class Asked:
    """What backward has done since the test began."""

    def __init__(self) -> None:
        self.frozen = self.norms = 0

    def unread(self) -> bool:
        """Whether one pass, of a model of ``LAYERS`` layers, has left the first input's gradient out."""
        assert (self.frozen, self.norms) in {(FROZEN_INPUT, NORMS), (0, 2 * LAYERS)}
        return bool(self.frozen)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    counts, linears, norm = Asked(), BoundLinears.backward, _BoundNorm.backward

    def backward(self: Any, values: Any, dys: Any, dxs: Any, wants: Any) -> Any:
        counts.frozen += not wants[0]
        return linears(self, values, dys, dxs, wants)

    def norm_backward(self: Any, *args: Any) -> Any:
        counts.norms += 1
        return norm(self, *args)

    monkeypatch.setattr(BoundLinears, "backward", backward)
    monkeypatch.setattr(_BoundNorm, "backward", norm_backward)
    return counts


def checkpointing(model: Any, use_reentrant: bool = True) -> Any:
    """``model`` as TRL makes it ready, under adapters or before it gets them."""
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def embedding_of(model: Any) -> nn.Module:
    return model.get_input_embeddings()


def decoder_of(model: Any) -> Any:
    return model.get_base_model().model


def by_peft(model: Any) -> None:
    """PEFT's own hook, for models without ``enable_input_require_grads``."""
    bare = types.SimpleNamespace(get_input_embeddings=model.get_input_embeddings)
    PeftModel._prepare_model_for_gradient_checkpointing(model, bare)


def by_peft_for_4bit(model: Any) -> None:
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model)


HOSTS = [checkpointing, by_peft, by_peft_for_4bit, lambda model: model.get_base_model().enable_input_require_grads()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("host", HOSTS, ids=["trl", "peft", "peft-4bit", "twice"])
def test_a_gradient_that_only_the_host_asks_for_is_not_computed(
    host: Callable[[Any], object], when: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the adapters are the same to the bit."""
    model = checkpointing(llama()) if host is HOSTS[-1] else llama()
    if when == "before":
        host(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)  # prepare_model_for_kbit_training freezes all that there is
    mine, stock = twins(model)
    if when == "after":
        for each in (mine, stock):
            host(each)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_("lora_" in name)
    found = train(mine, BATCH)
    assert asked.unread()
    assert_same(found, train(stock, BATCH))
    monkeypatch.setattr(FirstInput, "is_nobodys_wish", lambda *args: False)
    asked.frozen = asked.norms = 0
    before = train(mine, BATCH)
    assert not asked.unread()
    assert before.keys() == found.keys()
    assert all(torch.equal(before[name], found[name]) for name in found)


@pytest.mark.parametrize("memory", ["least", "fastest"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_4bit_weights(memory: str, dropout: float, asked: Asked) -> None:
    model = adapted(checkpointing(quantised(make_model("llama", **WHOLE_BLOCKS))), lora_dropout=dropout)
    mine, stock = twins(model, memory=memory)
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert asked.unread()


@pytest.mark.parametrize(("name", "is_leaf"), [("granite", False), ("gemma2", True), ("gemma3_text", True)])
def test_scaled_embeddings(name: str, is_leaf: bool, asked: Asked) -> None:
    """Scaled by the decoder, they are no leaf; by the embedding itself, they are."""
    mine, stock = twins(checkpointing(adapted(make_model(name))))
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert bool(asked.frozen) == is_leaf


def test_recordings(made: list[Replays], asked: Asked) -> None:  # noqa: F811
    mine, stock = twins(checkpointing(llama()))
    with transient(mine):
        for batch in make_batches(SEEN + 3):
            assert_same(train(mine, [batch]), train(stock, [batch]))
    assert made[-1].known
    assert asked.frozen


def test_the_first_input_waits_in_host_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that requires a gradient is held by the graph: it could not."""

    def run() -> Any:
        model = checkpointing(offloading.make_lora())
        return offloading.train(switched_on(model), [offloading.batch()])

    here = run()
    parking = Parking(monkeypatch, frozenset({"x2"}))
    offloading.assert_same(run(), here)
    assert not parking.device.violations


def test_without_the_hosts_wish_nothing_changes(asked: Asked) -> None:
    mine, stock = twins(llama())
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert asked.unread()  # as it always was
    checkpointing(mine)
    mine.get_base_model().disable_input_require_grads()
    assert_same(train(mine, BATCH), train(stock, BATCH))


# Those who do read it: each puts what it reads after a pass into ``found``.

Found = list[torch.Tensor]
Reader = Callable[[Any, Found], dict[str, Any]]


def _given(model: Any, found: Found) -> dict[str, Any]:
    embeddings = nn.functional.embedding(BATCH[0]["input_ids"], embedding_of(model).weight).requires_grad_()
    found.append(embeddings)
    return {"inputs_embeds": embeddings}


def _embedded_by_the_caller(model: Any, found: Found) -> dict[str, Any]:
    """A leaf that the host's hook has made one, of the very embedding."""
    found.append(embedding_of(model)(BATCH[0]["input_ids"]))
    return {"inputs_embeds": found[0]}


def _hook_on_the_embedding(model: Any, found: Found) -> dict[str, Any]:
    embedding_of(model).register_forward_hook(lambda module, args, output: found.append(output))
    return {}


def _hook_for_all_modules(model: Any, found: Found) -> dict[str, Any]:
    embedding = embedding_of(model)
    handle = register_module_forward_hook(
        lambda module, args, output: found.append(output) or handle.remove() if module is embedding else None
    )
    return {}


def _hook_on_the_first_layer(model: Any, found: Found) -> dict[str, Any]:
    decoder_of(model).layers[0].register_forward_hook(lambda layer, args, output: found.append(args[0]))
    return {}


def _hook_before_the_first_layer(model: Any, found: Found) -> dict[str, Any]:
    decoder_of(model).layers[0].register_forward_pre_hook(lambda layer, args: found.append(args[0]))
    return {}


def _hook_that_embeds_for_the_decoder(model: Any, found: Found) -> dict[str, Any]:
    def embed(decoder: Any, args: Any, kwargs: Any) -> Any:
        found.append(decoder.embed_tokens(kwargs.pop("input_ids")))
        return args, {**kwargs, "inputs_embeds": found[0]}

    decoder_of(model).register_forward_pre_hook(embed, with_kwargs=True)
    return {}


def _replaced_forward(model: Any, found: Found) -> dict[str, Any]:
    embedding = embedding_of(model)
    own = embedding.forward
    embedding.forward = lambda ids: found.append(own(ids)) or found[0]
    return {}


def _full_backward_hook(model: Any, found: Found) -> dict[str, Any]:
    def hear(module: nn.Module, dxs: Any, dys: Any) -> None:
        found.append(torch.zeros_like(dys[0]))
        found[0].grad = dys[0].clone()

    embedding_of(model).register_full_backward_hook(hear)
    return {}


READERS: list[Reader] = [
    _given,
    _embedded_by_the_caller,
    _hook_on_the_embedding,
    _hook_for_all_modules,
    _hook_on_the_first_layer,
    _hook_before_the_first_layer,
    _hook_that_embeds_for_the_decoder,
    _replaced_forward,
    _full_backward_hook,
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__.strip("_"))
def test_who_reads_it_gets_it(reader: Reader, runs: list[Call]) -> None:
    mine, stock = twins(checkpointing(llama()))
    grads = []
    for model in (mine, stock):
        found: Found = []
        arguments = {**BATCH[0], **reader(model, found)}
        if "inputs_embeds" in arguments:
            del arguments["input_ids"]
        model(**arguments).loss.backward()
        assert found[0].grad is not None
        grads.append(found[0].grad)
    assert_same({"x": grads[0]}, {"x": grads[1]})
    assert len(runs) == LAYERS


@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states(by_config: bool, runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decoder that collects them itself, without a word to its layers: told, no program would run."""
    monkeypatch.setattr(output_capturing, "maybe_install_capturing_hooks", lambda model: None)
    mine, stock = twins(checkpointing(llama()))
    grads = []
    for model in (mine, stock):
        found: Found = []
        for layer in decoder_of(model).layers:

            def forward(x: torch.Tensor, *, own: Any = layer.forward, found: Found = found, **kwargs: Any) -> Any:
                found.append(x)
                return own(x, **{**kwargs, "output_hidden_states": None})

            layer.forward = forward
        model.get_base_model().config.output_hidden_states = by_config
        model.get_base_model()(**BATCH[0], **({} if by_config else {"output_hidden_states": True})).loss.backward()
        grads.append(found[0].grad)
    assert_same({"x": grads[0]}, {"x": grads[1]})
    assert len(runs) == LAYERS


def test_a_hook_on_the_tensor_itself() -> None:
    """Put there from inside the pass, where no hook on a module tells."""
    mine, stock = twins(checkpointing(llama()))
    found: list[Found] = []
    for model in (mine, stock):
        found.append([])
        rotary, own = decoder_of(model).rotary_emb, found[-1]

        def listen(module: nn.Module, args: Any, own: Found = own) -> None:
            args[0].register_hook(lambda grad: own.append(grad.clone()))

        rotary.register_forward_pre_hook(listen)
        train(model, BATCH)
    assert_same(*({"x": own[0]} for own in found))


def test_a_wish_that_is_not_the_hosts() -> None:
    """Nothing on the embedding asks for a gradient: who does is not known."""
    mine, stock = twins(llama())
    grads = []
    for model in (mine, stock):
        found: Found = []
        ask = lambda module, args, found=found: found.append(args[0].requires_grad_())
        decoder_of(model).rotary_emb.register_forward_pre_hook(ask)
        train(model, BATCH)
        grads.append(found[0].grad)
    assert_same({"x": grads[0]}, {"x": grads[1]})


def test_layers_that_the_caller_runs_himself() -> None:
    """After passes of the decoder."""
    model = checkpointing(llama())
    model.get_base_model().set_attn_implementation("sdpa")
    mine, stock = twins(model)
    grads = []
    for model in (mine, stock):
        train(model, BATCH)
        decoder = decoder_of(model)
        x = decoder.embed_tokens(BATCH[0]["input_ids"])
        angles = decoder.rotary_emb(x, torch.arange(x.shape[1])[None])
        decoder.layers[0](x, attention_mask=None, position_embeddings=angles).square().mean().backward()
        grads.append(x.grad)
    assert_same({"x": grads[0]}, {"x": grads[1]})


def test_readers_that_are_gone_are_forgotten(asked: Asked) -> None:
    mine, stock = twins(checkpointing(llama()))
    handle = embedding_of(mine).register_forward_hook(lambda *args: None)
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert not asked.frozen
    handle.remove()
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert asked.frozen == FROZEN_INPUT


def test_what_transformers_captures_with_is_no_reader(asked: Asked) -> None:
    """It leaves a hook on each layer, which nobody hears in a call that does not ask for hidden states."""
    mine, stock = twins(checkpointing(llama()))
    mine(**BATCH[0], output_hidden_states=True)
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert asked.frozen == FROZEN_INPUT


TRAINED: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    {"trainable_token_indices": [3, 5, 7]},
]


@pytest.mark.parametrize("options", TRAINED, ids=lambda options: next(iter(options)))
def test_embeddings_that_train(options: dict[str, Any], runs: list[Call]) -> None:
    stock = checkpointing(llama(**options)).train()
    for name, parameter in stock.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.05)
    mine = switched_on(copy.deepcopy(stock))
    found = train(mine, BATCH)
    assert len(runs) == LAYERS
    assert any("embed" in name for name in found)
    assert_same(found, train(stock, BATCH))


def test_a_whole_model_that_trains() -> None:
    mine, stock = twins(checkpointing(tiny.make_model(tiny.make_tokenizer())))
    found = train(mine, BATCH)
    assert any("embed_tokens" in name for name in found)
    assert_same(found, train(stock, BATCH))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids)

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight  # type: ignore[return-value]


def test_an_embedding_that_is_wrapped_later() -> None:
    """What its wrapper's hooks see is not known."""
    mine, stock = twins(checkpointing(llama()))
    grads = []
    for model in (mine, stock):
        found: Found = []
        model.get_base_model().set_input_embeddings(Wrapper(embedding_of(model)))
        _hook_on_the_embedding(model, found)
        train(model, BATCH)
        grads.append(found[0].grad)
    assert_same({"x": grads[0]}, {"x": grads[1]})


# Layers that are no program, which the host checkpoints: without an input that requires a gradient they train nothing.


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize(
    "options", [{}, {"layers_to_transform": [1, 2], "target_modules": ["q_proj", "up_proj"]}], ids=["all", "last"]
)
def test_reentrant_checkpointing_of_a_layer_that_is_no_program(
    options: dict[str, Any], index: int, runs: list[Call]
) -> None:
    model = checkpointing(llama(**options))
    stock = copy.deepcopy(model).train()
    layer = decoder_of(model).layers[index]
    layer.forward = types.MethodType(type(layer).forward, layer)
    mine = switched_on(model).train()
    assert len(reasons(mine)) == 1
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert len(runs) == LAYERS - 1


@pytest.mark.parametrize("index", range(LAYERS))
def test_a_single_call_that_no_program_follows(index: int, runs: list[Call]) -> None:
    mine, stock = twins(checkpointing(llama()))
    expected = train(stock, BATCH)
    handle = decoder_of(mine).layers[index].mlp.register_forward_hook(lambda *args: None)
    assert_same(train(mine, BATCH), expected)
    assert len(runs) == LAYERS - 1
    handle.remove()
    assert_same(train(mine, BATCH), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_around_everything(use_reentrant: bool) -> None:
    """Run again in backward, the first layer is handed its input by somebody else."""
    mine, stock = twins(llama())
    found = []
    for model in (mine, stock):
        embedding_of(model).register_forward_hook(lambda module, args, output: output.requires_grad_())
        layer = decoder_of(model).layers[0]
        inner = layer.forward

        def outer(x: torch.Tensor, *, inner: Any = inner, **kwargs: Any) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(lambda x: inner(x, **kwargs), x, use_reentrant=use_reentrant)

        layer.forward = outer
        found.append(train(model, BATCH, use_cache=False))
    assert_same(*found)


# As it was.


def test_undo_restores_every_attribute() -> None:
    model = checkpointing(llama())
    before = tiny.describe(model)
    switched_on(model)
    train(model.train(), BATCH)
    model.eval()
    sloth_backend.undo(model)
    assert tiny.describe(model) == before


def test_a_copy_keeps_it(asked: Asked) -> None:
    """And the original does not take its passes for its own."""
    mine, stock = twins(checkpointing(llama()))
    twin = copy.deepcopy(mine)
    assert_same(train(twin, BATCH), train(stock, BATCH))
    assert_same(train(mine, BATCH), train(stock, BATCH))
    assert asked.unread()
