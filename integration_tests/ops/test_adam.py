"""Adam over many tensors in one launch: the kernels against plain torch, that against bitsandbytes and float64."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from sloth_kernels import launch
from sloth_kernels.optimizers import adam
from sloth_kernels.optimizers.batch import Batch, refusal

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
DTYPES = launch.INTERPRETER_DTYPES if launch.interpreting() else launch.TRITON_DTYPES
SIZES = [(1,), (255,), (256,), (257,), (2047,), (8, 160), (0,)]
BETAS = (0.875, 0.984375)
"""Exact in float32, with 1 - beta: the interpreter computes with Python's numbers, which are float64."""
STEPS = 3


def make_state(p: torch.Tensor, eight_bit: bool) -> dict[str, Any]:
    if not eight_bit:
        return {"step": 0, "state1": torch.zeros_like(p, dtype=torch.float32), "state2": torch.zeros_like(p).float()}
    blocks = launch.cdiv(p.numel(), adam.BLOCK)
    return {
        "step": 0,
        "state1": torch.zeros_like(p, dtype=torch.uint8),
        "state2": torch.zeros_like(p, dtype=torch.uint8),
        "absmax1": torch.zeros(blocks, device=p.device),
        "absmax2": torch.zeros(blocks, device=p.device),
        "qmap1": bnb.create_dynamic_map(signed=True).to(p.device),
        "qmap2": bnb.create_dynamic_map(signed=False).to(p.device),
    }


def make_tensors(dtype: torch.dtype, sizes: list[tuple[int, ...]] = SIZES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(DEVICE, dtype)) for size in sizes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Entries of very different sizes; whole blocks of zeros at first, as for LoRA's A; some that are not finite."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 10 ** (6 * torch.rand(p.shape, generator=generator) - 5)
        if step == 1:
            grad.flatten()[:300] = 0
        if step == 2:
            grad.flatten()[1::97] = float("inf")
            grad.flatten()[2::89] = float("nan")
        p.grad = grad.to(p)


def nearly(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for the last places: the powers of beta come from two libraries."""
    return torch.allclose(ours.float(), theirs.float(), rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.skipif(not launch.interpreting(), reason="a GPU's instructions are those of bitsandbytes, see tests/gpu")
@pytest.mark.parametrize(
    ("dtype", "eight_bit", "weight_decay"),
    [(dtype, bits, 0.1 * ((i + bits) % 2)) for i, dtype in enumerate(DTYPES) for bits in (True, False)],
)
def test_kernels_equal_reference(dtype: torch.dtype, eight_bit: bool, weight_decay: float, launches: Any) -> None:
    ours, theirs = make_tensors(dtype), make_tensors(dtype)
    our_states = [make_state(p, eight_bit) for p in ours]
    their_states = [make_state(p, eight_bit) for p in theirs]
    batch, before = None, launches.count
    for step in range(1, STEPS + 1):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        assert all(refusal(p, state) is None for p, state in zip(ours, our_states, strict=True))
        if batch is None:
            batch = Batch(ours, our_states)
        grads = [p.grad for p in ours if p.grad is not None]
        assert batch.stands(grads)
        with torch.no_grad():
            batch.update(grads, 1e-2, BETAS, 1e-8, weight_decay)
            for p, state in zip(theirs, their_states, strict=True):
                hyper = adam.Hyper(1e-2, *BETAS, 1e-8, weight_decay, step)
                adam.reference(p, p.grad, state, hyper)  # pyright: ignore[reportArgumentType]
    assert launches.count - before == STEPS
    for p, q, a, b in zip(ours, theirs, our_states, their_states, strict=True):
        assert a["step"] == STEPS
        assert nearly(p, q), (p - q).abs().max()
        for name in adam.FIELDS_8BIT if eight_bit else adam.FIELDS_32BIT:
            assert a[name].allclose(b[name], rtol=0, atol=0, equal_nan=True), (name, p.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_entry(signed: bool) -> None:
    """No entry is nearer than the one found; where two are as near, the even one is taken."""
    values = bnb.create_dynamic_map(signed=signed)
    lowest = -1.0 if signed else 0.0
    middles = (values[1:] + values[:-1]) * 0.5
    x = torch.cat((values, middles, torch.linspace(lowest, 1, 2001), torch.randn(2000).clamp(lowest, 1) * 1e-4))
    x = x if signed else x.abs()
    index, value = adam._reference_nearest(values, x, lowest)
    exact = (x.double()[:, None] - values.double()).abs()
    # The middle of two entries is rounded to float32, so half a unit in its last place is free.
    slack = torch.finfo(torch.float32).eps * x.abs().double()
    assert (exact.gather(1, index[:, None])[:, 0] <= exact.amin(1) + slack).all()
    assert (index[256 : 256 + 255] % 2 == 0).all()
    inner = (index > 0) & (index < 255)
    assert torch.equal(value[inner], values[index][inner])


def test_reference_follows_bitsandbytes_on_the_cpu() -> None:
    """Its CPU code rounds in another order, keeps no signs and finds the nearest entries but roughly near zero."""
    from bitsandbytes.optim import AdamW8bit

    params = [torch.nn.Parameter(p.detach().cpu()) for p in make_tensors(torch.float32, [(4096,), (50, 100)])]
    ours = [p.detach().clone() for p in params]
    states = [make_state(p, True) for p in ours]
    optimizer = AdamW8bit(params, lr=1e-3, betas=BETAS, weight_decay=0.0)
    for step in (1, 2):
        for p, q, state in zip(params, ours, states, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            adam.reference(q, p.grad, state, adam.Hyper(1e-3, *BETAS, 1e-8, 0.0, step))
        optimizer.step()
        for p, q, state in zip(params, ours, states, strict=True):
            theirs = optimizer.state[p]
            for k in "12":
                assert torch.allclose(state[f"absmax{k}"], theirs[f"absmax{k}"], rtol=1e-5)
                apart = (state[f"state{k}"].int() - theirs[f"state{k}"].int()).abs()
                near_zero = state[f"qmap{k}"][state[f"state{k}"].int()].abs() < 1e-3
                assert apart[~near_zero].max() <= 1
                assert (apart > 0).float().mean() < 0.05
            # The first step starts from equal moments, the second from indices of which some are neighbours.
            assert (q - p).abs().max() < (1e-6 if step == 1 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_32_bit_is_adam(dtype: torch.dtype) -> None:
    """Parameters within half a unit in the last place of Adam in float64, and of its float32 moments."""
    ours = make_tensors(dtype, [(1000,)])
    truth = ours[0].detach().double().requires_grad_()
    optimizer = torch.optim.Adam([truth], lr=1e-2, betas=BETAS)
    states = [make_state(ours[0], False)]
    for step in range(1, STEPS + 1):
        ours[0].grad = torch.randn(1000, generator=torch.Generator().manual_seed(step)).to(ours[0])
        truth.grad = ours[0].grad.double()
        with torch.no_grad():
            Batch(ours, states).update([ours[0].grad], 1e-2, BETAS, 1e-8, 0.0)
        optimizer.step()
        error = (ours[0].double() - truth).abs()
        allowed = step * (torch.finfo(dtype).eps / 2 * (truth.abs() + 0.03) + 1e-7)
        assert (error <= allowed).all(), error.max()
    assert torch.allclose(states[0]["state1"].double(), optimizer.state[truth]["exp_avg"], rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    (p,) = make_tensors(torch.float32, [(300,)])
    state = make_state(p, True)
    assert refusal(p, state) == "no gradient"
    p.grad = torch.zeros_like(p)
    assert refusal(p, state) is None
    for name, value in (
        ("absmax1", torch.zeros(1, device=DEVICE)),
        ("state2", state["state2"].float()),
        ("qmap1", None),
        ("state1", torch.zeros(600, dtype=torch.uint8, device=DEVICE)[::2]),
        ("step", torch.tensor(0)),
    ):
        assert refusal(p, state | {name: value}) is not None, name
