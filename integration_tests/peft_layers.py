"""PEFT's own LoRA layers over plain and 4-bit linears, and the same as the kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from integration_tests import numbers
from integration_tests.four_bit import from_bitsandbytes
from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import DenseWeight, Weight4bit
from sloth_kernels.ops import lora


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
    dropout: float = 0.0,
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
        config = LoraConfig(
            r=rank, lora_alpha=12, target_modules=target, use_rslora=rslora, lora_dropout=dropout,
            init_lora_weights=False,
        )  # fmt: skip
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
        Adapter(
            convert(layer.lora_A[name].weight),
            convert(layer.lora_B[name].weight),
            layer.scaling[name],
            getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0,
        )
        for name in layer.active_adapters
    ]
    return LoraLinear(weight, None if base.bias is None else convert(base.bias), adapters)


def _parameters(model: Siblings) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _in_float64(model: Siblings, leaves: Sequence[torch.Tensor]) -> list[LoraLinear]:
    """The model's linears with ``leaves`` for its adapters and everything else in float64, 4-bit weights too."""
    placed = {id(old): new for old, new in zip(_parameters(model), leaves, strict=True)}
    linears = linears_of(model, lambda t: placed[id(t)] if id(t) in placed else t.double())
    return [
        linear._replace(weight=DenseWeight(linear.weight.dense(torch.float32).double()))
        if isinstance(linear.weight, Weight4bit)
        else linear
        for linear in linears
    ]


DIRECT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far ours may be from stock itself, relative to the largest entry: both round, stock after each term."""


def compare_with_peft(model: Siblings, x: torch.Tensor, tolerance: float, autocast: torch.dtype | None = None) -> None:
    """The reference equals PEFT to the bit; ours obeys the numbers rule beside PEFT, in outputs and gradients.

    CUDA's dropout draws other masks in other dtypes, so there is no truth in float64 for it: there, ours is compared
    with PEFT under the same seed, within ``DIRECT``.
    """

    def run(fn: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
        def call(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
            torch.manual_seed(3)
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                return fn(x)

        return call

    call = ((x, *_parameters(model)), {})
    stock, upstream = run(model), numbers.random_upstream(run(model), call)
    peft = numbers.evaluate(stock, call, upstream)
    ours = numbers.evaluate(run(lambda x: lora.lora_linears(x, linears_of(model))), call, upstream)
    numbers.assert_same_form(ours, peft)
    if x.device.type == "cpu":
        reference = numbers.evaluate(run(lambda x: lora.reference(x, linears_of(model))), call, upstream)
        for (name, a), (_, b) in zip(reference.tensors(), peft.tensors(), strict=True):
            if name != "gradient of argument 0":  # siblings' terms add up in another order
                assert torch.equal(a, b), name
    if x.device.type != "cpu" and _drops(model):
        found = numbers.errors(ours, peft, peft, DIRECT[autocast or x.dtype])
    else:
        found = numbers.errors(ours, peft, truth_of(model, call, upstream), tolerance)
    broken = [str(error) for error in found if not error.holds]
    assert not broken, "\n".join(broken)


def _drops(model: Siblings) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def truth_of(model: Siblings, call: numbers.Call, upstream: Sequence[torch.Tensor]) -> numbers.Evaluation:
    """The same in float64; ``call`` has x and the adapters' parameters."""

    def in_float64(x: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        return lora.reference(x, _in_float64(model, leaves))

    return numbers.evaluate(in_float64, numbers.in_float64(call), upstream)
