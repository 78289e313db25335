"""Models with layer programs, and the same models without, trained side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import sloth_backend
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_backend.findings import Finding

TOLERANCE = 2e-5
"""Of a float32 tensor's largest entry: the same products, summed in another order."""
MODES = ("least", "auto", "fastest")
WHOLE_BLOCKS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""Rows of whole quantisation blocks: bitsandbytes' CPU kernels dequantise others wrongly."""
Results = Mapping[str, torch.Tensor]
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def adapted(model: Any, **options: Any) -> Any:
    """``model`` under PEFT's LoRA on all linears, B random instead of zero; ``options`` go to ``LoraConfig``."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def llama(**options: Any) -> Any:
    """A tiny Llama under LoRA, in evaluation mode as it was loaded; ``options`` go to ``LoraConfig``."""
    return adapted(make_model("llama"), **options).eval()


def quantised(model: Any, **options: Any) -> Any:
    """``model`` with the linears of its layers in bitsandbytes' NF4; ``options`` go to ``Linear4bit``."""
    layers = model.model.layers
    for name, linear in [*layers.named_modules()]:
        if isinstance(linear, nn.Linear):
            packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, quant_type="nf4", **options)
            packed.load_state_dict({"weight": linear.weight.detach().float()})
            parent, _, child = name.rpartition(".")
            setattr(layers.get_submodule(parent), child, packed.to(linear.weight.device))
    model.is_loaded_in_4bit = True
    return model


def takes(model: Any, attention: str) -> bool:
    """Whether transformers lets ``model`` attend so, which it does from then on; Gemma 2 not by sdpa since 5.23."""
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        return False
    return True


def switched_on(model: Any, **config: Any) -> Any:
    """``model`` itself with the backend on."""
    return sloth_backend.optimize(model, config={"print_report": False, **config})


def twins(model: Any, **config: Any) -> tuple[Any, Any]:
    """The model with the backend on, all of its layers programs, and a copy without; both train."""
    stock = copy.deepcopy(model)
    mine = switched_on(model, **config)
    assert not reasons(mine)
    return mine.train(), stock.train()


def programs(model: Any) -> list[Finding]:
    """What became of each layer."""
    found = sloth_backend.report(model).of(capability="layer_program")
    assert found, str(sloth_backend.report(model))
    return found


def reasons(model: Any) -> set[str]:
    """Why layers were skipped; empty where all of them run as programs."""
    return {finding.reason for finding in programs(model) if finding.action == "skipped"}


def plans_of(model: Any) -> list[Finding]:
    """What the report says of the memory plan."""
    return sloth_backend.report(model).of(capability="memory_plan")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all gradients, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def train(model: Any, batches: Sequence[Any] | None = None, seed: int = 3, **arguments: Any) -> dict[str, torch.Tensor]:
    """Losses of the batches (name ``loss``) and the gradients accumulated over them."""
    torch.manual_seed(seed)
    losses = []
    for batch in make_batches() if batches is None else batches:
        loss = model(**batch, **arguments).loss
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), **gradients(model)}


def assert_same(ours: Results, stock: Results, tolerance: float = TOLERANCE) -> None:
    """Equal names, and equal values up to rounding."""
    assert ours.keys() == stock.keys()
    off = {name: ((ours[name] - stock[name]).abs().max() / stock[name].abs().max()).item() for name in stock}
    assert not {name: share for name, share in off.items() if not share <= tolerance}
