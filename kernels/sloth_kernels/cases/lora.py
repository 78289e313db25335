"""The calls that test and time ``ops/lora.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import DenseWeight
from sloth_kernels.op import Call, Case, Timing

Scales = tuple[tuple[float, ...], ...]


def dense_linears(scales: Scales, tensors: Sequence[Any]) -> list[LoraLinear]:
    """Linears of ``tensors`` that are arguments of their own: for each sibling its weight, its bias, and A and B for
    each of its scales."""
    left = list(tensors)
    linears = []
    for own in scales:
        weight, bias, *adapters = (left.pop(0) for _ in range(2 + 2 * len(own)))
        pairs = zip(adapters[::2], adapters[1::2], own, strict=True)
        linears.append(LoraLinear(DenseWeight(weight), bias, [Adapter(*pair) for pair in pairs]))
    return linears


def random_tensors(
    generator: torch.Generator,
    n_in: int,
    outputs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    dtypes: tuple[torch.dtype, torch.dtype],
    trained: str,
    bias: bool,
) -> list[torch.Tensor | None]:
    """What ``dense_linears`` takes, of such sizes that y is about as large as x; ``dtypes`` are the frozen tensors' and
    the adapters'."""

    def randn(*size: int, std: float, dtype: torch.dtype, kind: str = "") -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=generator.device) * std
        return values.to(dtype).requires_grad_(kind in trained if kind else False)

    dtype, adapter_dtype = dtypes
    tensors: list[torch.Tensor | None] = []
    for n_out, own in zip(outputs, ranks, strict=True):
        tensors.append(randn(n_out, n_in, std=n_in**-0.5, dtype=dtype, kind="W"))
        tensors.append(randn(n_out, std=1.0, dtype=dtype, kind="b") if bias else None)
        for rank in own:
            tensors.append(randn(rank, n_in, std=n_in**-0.5, dtype=adapter_dtype, kind="A"))
            tensors.append(randn(n_out, rank, std=rank**-0.5, dtype=adapter_dtype, kind="B"))
    return tensors


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    trained: str = "xAB",
    bias: bool = False,
    wide: bool = False,
    strided: bool = False,
) -> Case:
    """``ranks`` lists each sibling's adapters; ``trained`` names what needs a gradient: x, A, B, b(ias), W; ``wide``
    adapters are float32 whatever x's dtype; a ``strided`` x is a slice of wider rows."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(0)
        n_in = shape[-1]
        x = torch.randn(*shape[:-1], n_in + 5 * strided, generator=generator, device=device).to(dtype)[..., :n_in]
        dtypes = dtype, torch.promote_types(dtype, torch.float32) if wide else dtype
        tensors = random_tensors(generator, n_in, outputs, ranks, dtypes, trained, bias)
        scales = tuple(tuple(0.5 + rank / 8 for rank in own) for own in ranks)
        return (x.requires_grad_("x" in trained), scales, *tensors), {}

    return Case(name, make)


def cases() -> Sequence[Case]:
    """One to three siblings, ranks of 1, 8 and 33, several adapters or none, each choice of what trains."""
    return [
        _case("one", (37, 33), [41], [[8]]),
        _case("qkv", (2, 9, 48), [40, 24, 24], [[8], [8], [8]]),
        _case("gate_up", (3, 5, 40), [72, 72], [[33], [33]], strided=True),
        _case("rank_1_bias", (2, 3, 4, 24), [17], [[1]], bias=True, trained="xABb"),
        _case("frozen_bias_float32_adapters", (21, 24), [32, 16], [[8], [1]], bias=True, wide=True),
        _case("float32_adapters", (21, 24), [32, 16], [[8], [8]], wide=True),
        _case("several_adapters", (19, 32), [24, 40], [[8, 1], [33, 8, 2]]),
        _case("one_without_adapters", (19, 32), [24, 40], [[], [8]]),
        _case("first_layer", (19, 32), [24, 40], [[8], [8]], trained="AB"),
        _case("frozen_adapters", (19, 32), [24, 40], [[8], [8]], trained="x"),
        _case("only_B", (19, 32), [24], [[8]], trained="B"),
        _case("trained_weights", (3, 7, 32), [24, 40], [[], []], trained="xW", strided=True),
        _case("trained_weights_and_biases", (19, 32), [24, 40], [[], []], trained="xWb", bias=True),
        _case("everything_trains", (19, 32), [24, 40], [[4], []], trained="xWbAB", bias=True),
        _case("only_W", (19, 32), [24], [[]], trained="W"),
        _case("one_token", (1, 64), [96, 32], [[8], [8]]),
    ]


def timings() -> Sequence[Timing]:
    """Llama 8B's query, key and value projections, gate and up, and down, on 4,096 tokens at rank 32."""
    groups = [("qkv", 4096, [4096, 1024, 1024]), ("gate_up", 4096, [14336, 14336]), ("down", 14336, [4096])]
    return [
        Timing(_case(name, (4096, n_in), outputs, [[32]] * len(outputs)), flops=4 * 4096 * n_in * sum(outputs))
        for name, n_in, outputs in groups
    ]
