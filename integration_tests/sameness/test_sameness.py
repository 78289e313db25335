"""Proof of sameness: training with the backend equals training without it, architecture by architecture.

The rule: at each step, for the loss and for the gradient of every trainable parameter, and for the final weights,
``|ours - float64 truth| <= |stock in the same dtype - truth| + tolerance``. Run plainly the ops take their
references; under ``TRITON_INTERPRET=1`` the same tests go through the Triton kernels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import sloth_backend
from integration_tests.sameness.architectures import SPECIALS, make_batches, make_model
from sloth_kernels import launch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""The stated small term, relative to the largest true entry of a tensor: a few units in the last place."""

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Trace:
    """What a short training run leaves behind, in float64 on the CPU."""

    losses: list[torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]


def train(model: Any, batches: list[Any], lr: float = 0.05) -> Trace:
    """Plain SGD: the update is linear in the gradient, so no optimizer state blurs what is compared."""
    model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in named], lr=lr)
    losses, gradients = [], []
    for batch in batches:
        loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
        loss.backward()
        losses.append(loss.detach().double().cpu())
        gradients.append({name: p.grad.double().cpu() for name, p in named if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Trace(losses, gradients, {name: p.detach().double().cpu() for name, p in named})


def assert_no_worse(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, tolerance: float, what: str) -> None:
    """The numbers rule, in the largest deviation of a tensor."""
    scale = truth.abs().max().clamp(min=1e-6)
    mine, theirs = (ours - truth).abs().max(), (stock - truth).abs().max()
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    assert mine <= theirs + tolerance * scale, f"{what}: off by {mine:.3e}, stock by {theirs:.3e}, of {scale:.3e}"


def compare(ours: Trace, stock: Trace, truth: Trace, tolerance: float) -> None:
    for step, (a, b, c) in enumerate(zip(ours.losses, stock.losses, truth.losses, strict=True)):
        assert_no_worse(a, b, c, tolerance, f"loss of step {step}")
    for step, (a, b, c) in enumerate(zip(ours.gradients, stock.gradients, truth.gradients, strict=True)):
        assert a.keys() == b.keys() == c.keys()
        for name in a:
            assert_no_worse(a[name], b[name], c[name], tolerance * (1 + step), f"gradient of {name}, step {step}")
    for name in ours.weights:
        assert_no_worse(ours.weights[name], stock.weights[name], truth.weights[name], tolerance, f"weight {name}")


def three_runs(model: Any, batches: list[Any], device: str, dtype: torch.dtype) -> tuple[Trace, Trace, Trace]:
    """The same training with the backend, without it, and in float64."""
    truth = train(copy.deepcopy(model).double(), batches)
    stock = train(copy.deepcopy(model).to(device), batches)
    mine = sloth_backend.optimize(copy.deepcopy(model).to(device), config={"print_report": False})
    report = sloth_backend.report(mine)
    assert report.of(action="changed", capability="linear_cross_entropy"), str(report)
    assert not report.of(action="skipped", capability="glu"), str(report)
    return train(mine, batches), stock, truth


def supported(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" or not launch.interpreting() or dtype in launch.INTERPRETER_DTYPES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIALS)
def test_full_training_is_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    if not supported(device, dtype):
        pytest.skip("Triton's interpreter has no bfloat16; the GPU run covers it")
    # The interpreter is a thousand times slower; rows stay longer than a window.
    batches = make_batches(1, length=10) if launch.interpreting() else make_batches()
    runs = three_runs(make_model(name, dtype), batches, device, dtype)
    compare(*runs, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECIALS)
def test_lora_training_is_the_same(name: str, device: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        make_model(name), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    runs = three_runs(model, make_batches(), device, torch.float32)
    compare(*runs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_rule_can_fail(name: str) -> None:
    """A loss that forgets one token is caught."""
    model, batches = make_model(name), make_batches()
    wrong = [{**batch, "labels": batch["labels"].clone()} for batch in batches]
    wrong[0]["labels"][1, 3] = -100
    truth, stock = train(copy.deepcopy(model).double(), batches), train(copy.deepcopy(model), batches)
    mine = sloth_backend.optimize(copy.deepcopy(model), config={"print_report": False})
    with pytest.raises(AssertionError, match="loss of step 0"):
        compare(train(mine, wrong), stock, truth, TOLERANCE[torch.float32])
