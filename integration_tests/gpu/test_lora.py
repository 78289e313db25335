"""What only a GPU shows of LoRA linears: real sizes in 16 bits over 4-bit weights, memory, waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests.numbers import evaluate
from integration_tests.peft_layers import Siblings, compare_with_peft, linears_of, siblings, truth_of
from sloth_kernels.dropout import drop
from sloth_kernels.ops import lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _in_4bit(n_in: int, outputs: list[int], dtype: torch.dtype, dropout: float = 0.0, **options: Any) -> Siblings:
    return siblings(
        n_in, outputs, dtype, device=CUDA, in_4bit=True, compute_dtype=dtype, ranks=[16], dropout=dropout, **options
    )


def _randn(*shape: int, dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(0)
    return (torch.randn(shape, device=CUDA, generator=generator) * size).to(dtype)


@DTYPES
@pytest.mark.parametrize(("n_in", "outputs"), [(2048, [2048, 512, 512]), (2048, [5504, 5504]), (5504, [2048])])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_numbers(n_in: int, outputs: list[int], dtype: torch.dtype, dropout: float) -> None:
    """Outputs and every gradient beside PEFT: by the numbers rule, or against PEFT itself under the same masks."""
    model = _in_4bit(n_in, outputs, dtype, dropout)
    compare_with_peft(model, _randn(2, 257, n_in, dtype=dtype).requires_grad_(), lora.OP.tolerance[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_float32_adapters_under_autocast(dropout: float) -> None:
    model = _in_4bit(1024, [1024, 256], torch.bfloat16, dropout, adapter_dtype=torch.float32)
    x = _randn(2, 257, 1024, dtype=torch.bfloat16).requires_grad_()
    compare_with_peft(model, x, lora.OP.tolerance[torch.bfloat16], torch.bfloat16)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4])
def test_float16_is_finite_where_stock_is(size: float) -> None:
    """And, as long as no value on the way there leaves float16, wherever the truth fits float16."""
    model = _in_4bit(2048, [2048, 512], torch.float16)
    x = _randn(513, 2048, dtype=torch.float16, size=size).requires_grad_()
    call = ((x, *(parameter for parameter in model.parameters() if parameter.requires_grad)), {})
    upstream = [torch.full((513, n), size / 100, device=CUDA, dtype=torch.float16) for n in (2048, 512)]
    ours = evaluate(lambda x, *_: lora.lora_linears(x, linears_of(model)), call, upstream)
    stock = evaluate(lambda x, *_: model(x), call, upstream)
    for (name, mine), (_, theirs) in zip(ours.tensors(), stock.tensors(), strict=True):
        assert (mine.isfinite() | ~theirs.isfinite()).all(), name
    if size <= 1e2:
        truth = truth_of(model, call, upstream)
        for (name, mine), (_, true) in zip(ours.tensors(), truth.tensors(), strict=True):
            assert (mine.isfinite() | (true.abs() > torch.finfo(torch.float16).max / 2)).all(), name


def _mask(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    return drop(x, 0.5)[1] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [64, 63, 62])
def test_masks_do_not_depend_on_where_x_lies(n: int, dtype: torch.dtype) -> None:
    """They are drawn again in the backward, for what may be another copy of x; the first are ``nn.Dropout``'s."""
    x = _randn(33, n, dtype=dtype).abs() + 1
    torch.manual_seed(7)
    stock = torch.nn.Dropout(0.5)(x) != 0
    unaligned = torch.empty(33 * n + 1, device=CUDA, dtype=dtype)[1:].view(33, n).copy_(x)
    spaced = torch.empty(33, 2 * n, device=CUDA, dtype=dtype)[:, ::2].copy_(x)
    transposed = x.t().contiguous().t()
    assert 0 < stock.sum() < stock.numel()
    for same in (x, x.clone(), unaligned, spaced, transposed):
        assert torch.equal(same, x)
        assert torch.equal(_mask(same), stock)


def test_waits_for_nothing() -> None:
    model = _in_4bit(512, [512, 128], torch.bfloat16, dropout=0.1)
    x = _randn(256, 512, dtype=torch.bfloat16).requires_grad_()
    sum(y.sum() for y in lora.lora_linears(x, linears_of(model))).backward()  # type: ignore[union-attr]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(y.sum() for y in lora.lora_linears(x, linears_of(model))).backward()  # type: ignore[union-attr]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_between_forward_and_backward(dropout: float) -> None:
    """y, t and nothing of the size of x: no mask, no cast, no dense weight."""
    model = _in_4bit(4096, [1024, 1024], torch.bfloat16, dropout)
    x = _randn(4096, 4096, dtype=torch.bfloat16).requires_grad_()
    lora.lora_linears(x, linears_of(model))
    before = torch.cuda.memory_allocated()
    ys = lora.lora_linears(x, linears_of(model))
    kept = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in ys)
    assert kept < 2**20, kept
