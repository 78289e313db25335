"""One launch a step beside bitsandbytes' own 8-bit AdamW on a CUDA GPU: equal to the bit, and no wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sloth_backend.findings import Edits
from sloth_plugins import optimizer_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANK, HIDDEN, INNER, LAYERS = 32, 4096, 14336, 32
WIDTHS = [
    (HIDDEN, HIDDEN),
    (HIDDEN, 1024),
    (HIDDEN, 1024),
    (HIDDEN, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
]
"""Inputs and outputs of a layer's linears in a Llama of 8B parameters."""
LORA = [shape for _ in range(LAYERS) for n_in, n_out in WIDTHS for shape in ((RANK, n_in), (n_out, RANK))]
ODD = [(1,), (255,), (256,), (257,), (4095,), (4096,), (100_003,), (3, 5, 7, 41)]


def make_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Every other one starts at zero, as LoRA's B does."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, device="cuda", generator=generator) * 0.02 for shape in shapes]
    return [torch.nn.Parameter((p * 0 if i % 2 else p).to(dtype)) for i, p in enumerate(made)]


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, attached: bool, **options: Any) -> Any:
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(make_params(shapes, dtype), **{"lr": 2e-4, "weight_decay": 0.01, **options})
    if attached:
        (finding,) = optimizer_step.attach(optimizer, Edits())
        assert finding.action == "changed", finding
    return optimizer


def params_of(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def backward(optimizers: Sequence[Any], seed: int, scale: float = 1e-3, special: bool = False) -> None:
    """Equal gradients for all: zeros for every other tensor in the first step, as for LoRA's A; sizes far apart.

    ``special``: some entries are infinite, NaN, denormal, large or -0.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    for i, together in enumerate(zip(*map(params_of, optimizers), strict=True)):
        shape = together[0].shape
        sizes = torch.rand(shape, device="cuda", generator=generator)
        grad = torch.randn(shape, device="cuda", generator=generator) * scale * 10 ** (4 * sizes - 3)
        if seed == 1 and i % 2 == 0:
            grad.zero_()
        if special and grad.numel() >= 4096:
            flat = grad.flatten()
            for first, value in enumerate((float("inf"), float("nan"), -float("inf"), 1e-41, 3e4, -0.0)):
                flat[first :: 997 + first] = value
            grad = flat.view(shape)
        for p in together:
            p.grad = grad.to(p.dtype)


def assert_same(ours: Any, theirs: Any, count: int) -> None:
    """Equal to the bit: parameters, indices, scales and 32-bit moments."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        a, b = ours.state[p], theirs.state[q]
        assert a["step"] == b["step"] == count
        for name in ("state1", "state2", "absmax1", "absmax2"):
            if name in b:
                unequal = bits(a[name]) != bits(b[name])
                assert not unequal.any(), (name, tuple(p.shape), unequal.sum(), a[name][unequal], b[name][unequal])
        unequal = bits(p) != bits(q)
        assert not unequal.any(), (tuple(p.shape), unequal.sum(), p[unequal], q[unequal])


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, for which NaN equals NaN and the zeros differ."""
    return x.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_equal_to_bitsandbytes_for_odd_sizes(
    dtype: torch.dtype, weight_decay: float, betas: tuple[float, float]
) -> None:
    options = {"weight_decay": weight_decay, "betas": betas, "lr": 1e-2}
    ours, theirs = make(ODD, dtype, True, **options), make(ODD, dtype, False, **options)
    for step in range(1, 13):
        backward((ours, theirs), step, scale=1.0)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_for_special_gradients(dtype: torch.dtype) -> None:
    """Of 8-bit states: what is not finite leaves a parameter alone."""
    shapes = [(4096,), (100_003,), (32, 4096)]
    ours, theirs = make(shapes, dtype, True), make(shapes, dtype, False)
    for step in range(1, 7):
        backward((ours, theirs), step, special=step > 2)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, step)


def test_equal_for_all_adapters_of_a_model() -> None:
    shapes = [*LORA, *ODD]
    assert len(LORA) == 448
    ours, theirs = make(shapes, torch.bfloat16, True), make(shapes, torch.bfloat16, False)
    for step in range(1, 6):
        backward((ours, theirs), step)
        ours.step()
        theirs.step()
    assert_same(ours, theirs, 5)


def test_equal_under_a_schedule() -> None:
    both = [make(ODD, torch.bfloat16, attached) for attached in (True, False)]
    schedulers = [LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) / (1 + step)) for optimizer in both]
    for step in range(1, 9):
        backward(both, step)
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert_same(*both, 8)


def test_states_go_on_in_either_optimizer() -> None:
    straight = make(ODD, torch.bfloat16, False)
    swapped = [make(ODD, torch.bfloat16, attached) for attached in (True, False)]
    for step in range(1, 9):
        active, resting = swapped if step % 2 else swapped[::-1]
        backward((straight, active), step)
        straight.step()
        active.step()
        resting.load_state_dict(active.state_dict())
        for p, q in zip(params_of(resting), params_of(active), strict=True):
            p.data.copy_(q)
    assert_same(swapped[0], straight, 8)
    assert_same(swapped[1], straight, 8)


@pytest.fixture
def no_waits() -> Iterator[Callable[[], None]]:
    """Call it: from then on whatever waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_waits_for_nothing(no_waits: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while the device is busy for long, with new gradients at other addresses each time."""
    ours, theirs = make(ODD, torch.bfloat16, True), make(ODD, torch.bfloat16, False)
    backward((ours, theirs), 1)
    ours.step()
    theirs.step()

    def refuse(*args: Any) -> None:
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", refuse)
        for step in range(2, 6):
            held = [p.grad for p in params_of(ours)]  # so that the next ones lie elsewhere
            backward((ours,), step)
            torch.cuda._sleep(20_000_000)
            no_waits()
            ours.step()
            torch.cuda.set_sync_debug_mode("default")
            del held
    for step in range(2, 6):
        backward((theirs,), step)
        theirs.step()
    assert_same(ours, theirs, 5)


def test_many_steps_ahead_of_the_device() -> None:
    """Tables of addresses that were sent are not overwritten before they are read."""
    ours, theirs = make(ODD, torch.bfloat16, True), make(ODD, torch.bfloat16, False)
    kept: list[Any] = []
    for step in range(1, 41):
        backward((ours, theirs), step)
        theirs.step()
        kept.append([(p, p.grad) for p in params_of(ours)])
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for together in kept:
        for p, grad in together:
            p.grad = grad
        ours.step()
    assert_same(ours, theirs, 40)


def test_host_time(capsys: pytest.CaptureFixture[str]) -> None:
    times = {}
    for name, attached in (("one launch", True), ("bitsandbytes", False)):
        optimizer = make(LORA, torch.bfloat16, attached)
        times[name] = [timed_step(optimizer, step) for step in range(1, 12)][3:]
        assert all(optimizer.state[p]["step"] == 11 for p in params_of(optimizer))
        del optimizer
        torch.cuda.empty_cache()
    with capsys.disabled():
        for name, measured in times.items():
            host, whole = (sorted(values)[len(values) // 2] for values in zip(*measured, strict=True))
            print(f"\n{len(LORA)} tensors, {name}: host {host:.2f} ms, with the device {whole:.2f} ms a step", end="")


def timed_step(optimizer: Any, seed: int) -> tuple[float, float]:
    """Milliseconds until ``step`` returns, and until the device is done."""
    backward((optimizer,), seed)
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * host, 1e3 * (time.perf_counter() - start)
