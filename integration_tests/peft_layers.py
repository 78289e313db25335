"""PEFT's own LoRA layers over plain and 4-bit linears, and the same as the kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from integration_tests.four_bit import from_bitsandbytes
from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import DenseWeight, Weight4bit


class Siblings(torch.nn.Module):
    """Linears that share an input, as a ``ModuleList`` PEFT can adapt."""

    def __init__(self, linears: Sequence[torch.nn.Module], in_4bit: bool) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleList(linears)
        self.is_loaded_in_4bit = in_4bit

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


def siblings(
    n_in: int,
    outputs: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device,
    in_4bit: bool = False,
    bias: bool = False,
    ranks: Sequence[int] = (8,),
    adapter_dtype: torch.dtype | None = None,
    rslora: bool = False,
    **options: Any,
) -> Siblings:
    """Frozen linears of ``dtype`` with one active adapter for each of ``ranks``, whose B is random instead of zero.

    ``options`` go to bitsandbytes' ``Linear4bit``.
    """
    torch.manual_seed(0)
    linears = []
    for n_out in outputs:
        linear: torch.nn.Module = torch.nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
        if in_4bit:
            quantised = bnb.nn.Linear4bit(n_in, n_out, bias=bias, **{"quant_type": "nf4", **options})
            quantised.load_state_dict({name: tensor.float() for name, tensor in linear.state_dict().items()})
            linear = quantised.to(dtype)
        linears.append(linear.to(device))
    model = Siblings(linears, in_4bit)
    names = [f"adapter_{i}" for i in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        target = r"linears\.\d+"
        config = LoraConfig(r=rank, lora_alpha=12, target_modules=target, use_rslora=rslora, init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(device, adapter_dtype or dtype)
    return model.to(device)


def linears_of(model: Siblings, convert: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> list[LoraLinear]:
    """The model's linears and active adapters; ``convert`` is applied to each tensor that is not quantised."""
    return [_linear_of(layer, convert) for layer in model.linears]


def _linear_of(layer: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> LoraLinear:
    base = layer.get_base_layer()
    weight: Any = base.weight
    if isinstance(weight, bnb.nn.Params4bit):
        weight = Weight4bit(from_bitsandbytes(weight, weight.quant_state), base.compute_dtype)
    else:
        weight = DenseWeight(convert(weight))
    adapters = [
        Adapter(convert(layer.lora_A[name].weight), convert(layer.lora_B[name].weight), layer.scaling[name])
        for name in layer.active_adapters
    ]
    return LoraLinear(weight, None if base.bias is None else convert(base.bias), adapters)
