"""What the tests of offloaded checkpointing share: tiny models, a training step, and the ring forced on on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from integration_tests.plugins.lazy_device import LazyDevice, make_rings, ring_of
from sloth_backend.findings import Edits
from sloth_plugins.offloaded_checkpointing.seam import Rings, Seam, checkpointed_layers

LAYERS = 4
FLAVOURS = [
    pytest.param({"use_reentrant": True}, id="reentrant"),
    pytest.param({"use_reentrant": False}, id="non_reentrant"),
]
Gradients = dict[str, torch.Tensor]


def make_llama(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).train()


def make_lora(**overrides: Any) -> Any:
    model = make_llama(**overrides)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def batch(length: int = 12, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(model: Any, batches: list[dict[str, torch.Tensor]], **options: Any) -> tuple[list[float], Gradients]:
    """Losses, and the gradients accumulated over ``batches``."""
    torch.manual_seed(3)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward(**options)
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Forced:
    """The ring, switched on for a model on the CPU: all layers offload but the last ``keep``."""

    def __init__(self, model: Any, keep: int = 1, **options: Any) -> None:
        self.device = LazyDevice()
        self.edits = Edits()
        self.rings: Rings = make_rings(self.device, **options)
        layers = checkpointed_layers(base(model)).values()
        plan = {layer: "offload" if n < len(layers) - keep else "recompute" for n, layer in enumerate(layers)}
        Seam(base(model), plan, self.rings).install(self.edits)  # type: ignore[arg-type]

    def assert_idle(self) -> None:
        """Every copy saw live memory, and no layer input is held any more (without help from the garbage collector)."""
        assert not self.device.violations
        assert ring_of(self.rings).memory.bytes_used == 0


@contextmanager
def forced(model: Any, **options: Any) -> Iterator[Forced]:
    ring = Forced(model, **options)
    yield ring
    ring.assert_idle()
    ring.edits.rollback()


def assert_same(ours: tuple[list[float], Gradients], stock: tuple[list[float], Gradients]) -> None:
    assert ours[0] == stock[0]
    assert ours[1].keys() == stock[1].keys()
    assert ours[1]
    for name, gradient in stock[1].items():
        assert torch.equal(ours[1][name], gradient), name
