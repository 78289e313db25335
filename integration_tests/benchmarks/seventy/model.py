"""Llama 3.1 70B's shapes with random weights, built on a device: NF4 linears, everything else in bf16.

In float32 it is the same model: values that were rounded to bf16, bytes that were packed from them.

What is random is drawn from the device's generator with one seed, so that processes on equal devices build one model.
No more than one dense linear is there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM

from integration_tests.benchmarks.training.models import LLAMA, Shape

SEVENTY = Shape("llama", 8192, 28672, 80, 64, 8, 128256, LLAMA)
"""Llama 3.1 70B."""
DECODER_LAYER = "LlamaDecoderLayer"
STD = 0.02
"""Of every matrix, as transformers initialises Llama's."""
DTYPE = torch.bfloat16
NF4 = {"compress_statistics": True, "quant_type": "nf4"}
"""Double-quantised."""


def shape(tiny: bool = False, layers: int | None = None) -> Shape:
    """The model's, with other layers or in the size of a test."""
    found = SEVENTY.tiny() if tiny else SEVENTY
    return found if layers is None else replace(found, layers=layers)


def build(of: Shape, device: torch.device, seed: int = 0, dtype: torch.dtype = DTYPE, attention: str = "sdpa") -> Any:
    """A causal language model of transformers on ``device`` that computes in ``dtype``, quantised, without adapters.

    What is packed is stored as ``dtype``, as FSDP asks for.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(of.config(), dtype=dtype, attn_implementation=attention)
    source = torch.Generator(device).manual_seed(seed)
    for parent, name, linear in list(_layer_linears(model)):
        setattr(parent, name, _quantised(linear, device, source, dtype))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = _values(parameter.shape, device, source).to(dtype)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    _refuse_missing(model)
    model.config.use_cache = False
    model.is_loaded_in_4bit = True
    return model


def _layer_linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Those of the decoder layers, each with where it is."""
    for layer in model.model.layers:
        for parent in layer.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


def _values(size: torch.Size, device: torch.device, source: torch.Generator) -> torch.Tensor:
    """A matrix's, normal; a norm's, one. In bf16, whatever they are used in."""
    if len(size) == 1:
        return torch.ones(size, dtype=DTYPE, device=device)
    return torch.empty(size, dtype=DTYPE, device=device).normal_(0.0, STD, generator=source)


def _quantised(linear: nn.Linear, device: torch.device, source: torch.Generator, dtype: torch.dtype) -> Linear4bit:
    """One of its size, its weight drawn on the device and quantised there by bitsandbytes."""
    packed = {**NF4, "quant_storage": dtype}
    sizes = (linear.in_features, linear.out_features)
    made = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device=torch.device("meta"), **packed)
    dense = _values(linear.weight.shape, device, source)
    packing: Any = Params4bit
    made.weight = packing(dense, requires_grad=False, module=made, **packed).to(device)
    return made


def _refuse_missing(model: nn.Module) -> None:
    """Tensors that were never made would fail much later, and in other words.

    Raises:
        RuntimeError: a parameter or a buffer is still on the meta device.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise RuntimeError(f"{len(missing)} tensors of the model were not built, the first is {missing[0]}")


def checksum(model: nn.Module) -> int:
    """Sum of all packed bytes, for processes to find out whether they built one model."""
    return sum(int(packed.view(torch.uint8).sum(dtype=torch.int64)) for packed in _packed(model))


def parameters(model: nn.Module) -> int:
    """How many there are; packed ones count as the two that each byte holds."""
    quantised = sum(2 * packed.nbytes for packed in _packed(model))
    plain = sum(p.numel() for p in model.parameters() if not isinstance(p, Params4bit))
    return quantised + plain


def _packed(model: nn.Module) -> Iterator[torch.Tensor]:
    """The packed weights as plain tensors."""
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            yield parameter.detach().as_subclass(torch.Tensor)
