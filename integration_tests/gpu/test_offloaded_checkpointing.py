"""Offloaded checkpointing on a CUDA GPU: the host's numbers to the bit, the memory promised, no wait missing."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins.offloaded_checkpointing as plugin
from sloth_backend import SlothConfig
from sloth_backend.findings import Edits
from sloth_backend.run import Run
from sloth_plugins.offloaded_checkpointing.device import CudaDevice, PinError
from sloth_plugins.offloaded_checkpointing.host_memory import map_pages
from sloth_plugins.offloaded_checkpointing.seam import FUNCTION

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FLAVOURS = [{"use_reentrant": True}, {"use_reentrant": False}]
IDS = ["reentrant", "non_reentrant"]
HIDDEN = 1024


def make_llama(layers: int = 8, attention: str = "eager", norms_only: bool = False) -> LlamaForCausalLM:
    """A random bf16 Llama on the GPU; eager attention repeats its results to the bit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2048, "num_hidden_layers": layers, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096)
    with torch.device("cuda:0"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not norms_only or "norm" in name)
    return model.train()


def batch(length: int = 512, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


def train(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The losses (name ``loss``) and all gradients, accumulated over ``batches``."""
    model.zero_grad(set_to_none=True)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses), **gradients}


@contextmanager
def offloaded(model: Any, **options: Any) -> Iterator[None]:
    """The plugin, alone, on ``model``; undone at the end."""
    run, edits = Run("user", SlothConfig(**options), torch.device("cuda:0")), Edits()
    findings = plugin.sloth_patch_model(model, run, None, edits)
    assert any(finding.action == "changed" for finding in findings)
    yield
    edits.rollback()


def assert_same(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert ours.keys() == stock.keys()
    assert [name for name in stock if not torch.equal(ours[name], stock[name])] == []


@pytest.mark.parametrize("flavour", FLAVOURS, ids=IDS)
@pytest.mark.parametrize("norms_only", [False, True], ids=["full", "frozen_base"])
def test_same_numbers_as_the_host(flavour: dict[str, bool], norms_only: bool) -> None:
    model = make_llama(norms_only=norms_only)
    model.gradient_checkpointing_enable(flavour)
    batches = [batch(512), batch(1000, seed=1), batch(768, rows=1, seed=2), batch(512, seed=3)]
    stock = train(model, batches)
    assert_same(train(model, batches), stock)
    with offloaded(model):
        for _ in range(3):
            assert_same(train(model, batches), stock)
        assert plugin.host_bytes(model) > 0
    assert_same(train(model, batches), stock)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=IDS)
@pytest.mark.parametrize("slow", ["copies", "compute"])
def test_no_wait_is_missing(monkeypatch: pytest.MonkeyPatch, flavour: dict[str, bool], slow: str) -> None:
    model = make_llama()
    model.gradient_checkpointing_enable(flavour)
    batches = [batch(512), batch(700, seed=1)]
    stock = train(model, batches)
    copy = CudaDevice.copy

    def slow_copy(self: CudaDevice, target: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
        copy(self, target, source, stream)

    hooks = []
    if slow == "copies":
        monkeypatch.setattr(CudaDevice, "copy", slow_copy)
    else:
        layers = model.model.layers
        hooks = [layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000)) for layer in layers]
    with offloaded(model):
        for _ in range(2):
            assert_same(train(model, batches), stock)
    for hook in hooks:
        hook.remove()


def peak(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes of device memory at the worst moment of a step, above what the model holds at rest."""
    train(model, [inputs])
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    model(**inputs).loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - at_rest


@pytest.mark.parametrize("flavour", FLAVOURS, ids=IDS)
def test_peak_falls_by_all_inputs_but_two(flavour: dict[str, bool]) -> None:
    layers, rows, length = 24, 8, 2048
    model = make_llama(layers, attention="sdpa", norms_only=True)
    model.gradient_checkpointing_enable(flavour)
    inputs = batch(length, rows)
    stock = peak(model, inputs)
    with offloaded(model):
        saved = stock - peak(model, inputs)
    expected = (layers - 2) * rows * length * HIDDEN * 2
    assert abs(saved - expected) <= 0.15 * expected, f"saved {saved / 2**20:.0f} MiB of {expected / 2**20:.0f}"


def test_host_memory_is_what_is_needed_and_is_reused() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    needed = 7 * 2 * 1000 * HIDDEN * 2
    with offloaded(model):
        train(model, [batch(1000)])
        held = plugin.host_bytes(model)
        assert needed <= held <= 1.05 * needed
        train(model, [batch(length) for length in (1000, 517, 999, 601, 1000)])
        assert plugin.host_bytes(model) == held


def test_undo_unpins_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()
    pin, unpin = CudaDevice.pin, CudaDevice.unpin

    def counted_pin(self: CudaDevice, memory: Tensor) -> None:
        pin(self, memory)
        pinned.add(memory.data_ptr())

    def counted_unpin(self: CudaDevice, memory: Tensor) -> None:
        unpin(self, memory)
        pinned.remove(memory.data_ptr())

    monkeypatch.setattr(CudaDevice, "pin", counted_pin)
    monkeypatch.setattr(CudaDevice, "unpin", counted_unpin)
    model = make_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with offloaded(model):
        loss = model(**batch()).loss
        memory = weakref.ref(vars(model.model.layers[0])[FUNCTION].rings.on(torch.device("cuda:0")).memory)
        assert pinned
    loss.backward()
    del loss
    assert memory() is None
    assert not pinned


def test_the_host_runs_ahead() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch()
    with offloaded(model):
        train(model, [inputs])
        torch.cuda.synchronize()
        # Well over a tenth of a second of work on the device in each layer; the host must not wait for any of it.
        layers = model.model.layers
        hooks = [layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(300_000_000)) for layer in layers]
        start = time.perf_counter()
        loss = model(**inputs).loss
        submitted = time.perf_counter() - start
        torch.cuda.synchronize()
        finished = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        loss.backward()
    assert submitted < finished / 3


def test_a_refused_pin_is_reported_and_forgotten() -> None:
    device, page = CudaDevice(torch.device("cuda:0")), map_pages(1)
    assert page is not None
    device.pin(page)
    assert page.is_pinned()
    with pytest.raises(PinError, match="already"):
        device.pin(page)
    assert torch.ones(3, device="cuda").sum() == 3
    device.unpin(page)
    assert not page.is_pinned()
    assert torch.ones(3, device="cuda").sum() == 3


def test_pageable_memory_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CudaDevice, memory: Tensor) -> None:
        raise PinError("not today")

    model = make_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = train(model, [batch()])
    monkeypatch.setattr(CudaDevice, "pin", refuse)
    with offloaded(model), pytest.warns(RuntimeWarning, match="could not be pinned: not today"):
        assert_same(train(model, [batch()]), stock)
