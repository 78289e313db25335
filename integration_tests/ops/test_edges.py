"""What the ops promise beside their numbers: layouts, dtypes, frozen inputs, empty inputs, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integration_tests import numbers
from sloth_kernels import launch
from sloth_kernels.ops import glu, rms_norm, rope

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


def test_frozen_weight_costs_no_kernel(launches: Any) -> None:
    x, weight = _randn(3, 8).requires_grad_(), torch.nn.Parameter(_randn(8), requires_grad=False)
    rms_norm.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None
    assert launches.count == 2
    weight.requires_grad_()
    rms_norm.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None
    assert launches.count == 2 + 3


def test_weight_gradient_is_the_same_each_time() -> None:
    x, weight, dy = _randn(999, 24).requires_grad_(), _randn(24).requires_grad_(), _randn(999, 24)
    first, second = (torch.autograd.grad(rms_norm.rms_norm(x, weight, 1e-6), weight, dy)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_frozen_input_still_trains_the_weight() -> None:
    weight = _randn(8).requires_grad_()
    rms_norm.rms_norm(_randn(3, 8), weight, 1e-6).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", rms_norm.VARIANTS)
def test_rms_norm_promotes_as_stock(variant: str, half: torch.dtype) -> None:
    x, weight = _randn(3, 8, dtype=half), _randn(8)
    y = rms_norm.rms_norm(x, weight, 1e-6, variant)
    assert y.dtype == rms_norm.reference(x, weight, 1e-6, variant).dtype
    assert y.dtype == (torch.float32 if variant == "cast_scale" else half)


def test_rms_norm_wider_than_a_program(launches: Any) -> None:
    x, weight = _randn(2, rms_norm.MAX_HIDDEN + 1), _randn(rms_norm.MAX_HIDDEN + 1)
    assert torch.equal(rms_norm.rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))
    assert launches.count == 0


def test_rms_norm_refuses_a_weight_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        rms_norm.rms_norm(_randn(3, 8), _randn(4), 1e-6)


def test_no_tokens(launches: Any) -> None:
    x, heads = _randn(0, 8).requires_grad_(), _randn(2, 0, 3, 8).requires_grad_()
    outputs = [
        rms_norm.rms_norm(x, _randn(8), 1e-6),
        glu.glu(x, x),
        *rope.rope(heads, heads, _randn(2, 0, 8), _randn(2, 0, 8), unsqueeze_dim=2),
    ]
    assert [tuple(y.shape) for y in outputs] == [(0, 8), (0, 8), (2, 0, 3, 8), (2, 0, 3, 8)]
    torch.stack([y.sum() for y in outputs]).sum().backward()
    assert launches.count == 0


@pytest.mark.parametrize("transposed", [True, False])
def test_rope_keeps_the_layout(transposed: bool) -> None:
    q, k = _randn(2, 3, 4, 8).requires_grad_(), _randn(2, 3, 2, 8).requires_grad_()
    views = (q.transpose(1, 2), k.transpose(1, 2)) if transposed else (q, k)
    angles = _randn(2, 3, 8), _randn(2, 3, 8)
    turned = rope.rope(*views, *angles, unsqueeze_dim=1 if transposed else 2)
    # The other order in memory, as attention may hand its gradients back.
    upstream = [_randn(*(t.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2) for t in turned]
    gradients = torch.autograd.grad(turned, views, upstream)
    for view, output, gradient in zip(views, turned, gradients, strict=True):
        assert output.stride() == view.stride()
        assert gradient.stride() == view.stride()


def test_rope_of_a_slice_is_dense() -> None:
    fused = _randn(2, 3, 7, 8)
    q, k = (t.transpose(1, 2) for t in fused[:, :, :6].split((4, 2), 2))
    q_out, k_out = rope.rope(q, k, _randn(1, 3, 8), _randn(1, 3, 8))
    assert q_out.transpose(1, 2).is_contiguous()
    assert k_out.transpose(1, 2).is_contiguous()


def test_rope_gives_angles_their_gradient(launches: Any) -> None:
    q, k, cos, sin = _randn(1, 2, 3, 4), _randn(1, 1, 3, 4), _randn(1, 3, 4).requires_grad_(), _randn(1, 3, 4)
    rope.rope(q, k, cos, sin)[0].sum().backward()
    assert cos.grad is not None
    assert launches.count == 0


def test_rope_is_one_launch_each_way(launches: Any) -> None:
    q, k, cos, sin = _randn(1, 2, 3, 4).requires_grad_(), _randn(1, 1, 3, 4).requires_grad_(), *_randn(2, 1, 3, 4)
    q_out, k_out = rope.rope(q, k, cos, sin)
    assert launches.count == 1
    (q_out.sum() + k_out.sum()).backward()
    assert launches.count == 2


def test_rope_of_queries_alone_gives_keys_no_gradient_but_zero() -> None:
    q, k, cos, sin = _randn(1, 2, 3, 4).requires_grad_(), _randn(1, 1, 3, 4).requires_grad_(), *_randn(2, 1, 3, 4)
    rope.rope(q, k, cos, sin)[0].sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert not k.grad.any()


@pytest.mark.parametrize("bad", [(3, 4), (1, 3, 10), (5, 3, 4), (1, 2, 4)])
def test_rope_leaves_misfits_to_torch(bad: tuple[int, ...]) -> None:
    """Angles that do not fit raise torch's error, and never make a kernel read beyond them."""
    q, k = _randn(4, 2, 3, 4), _randn(4, 1, 3, 4)
    try:
        expected = rope.reference(q, k, _randn(*bad), _randn(*bad))
    except RuntimeError as error:
        with pytest.raises(type(error)):
            rope.rope(q, k, _randn(*bad), _randn(*bad))
    else:
        assert all(map(torch.equal, rope.rope(q, k, _randn(*bad), _randn(*bad)), expected))


def test_glu_broadcasts_as_torch(launches: Any) -> None:
    gate, up = _randn(3, 4), _randn(4)
    assert torch.equal(glu.glu(gate, up), glu.reference(gate, up))
    assert launches.count == 0


def test_glu_halves_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = _randn(4, 5, 24).requires_grad_().chunk(2, -1)
    upstream = _randn(4, 5, 12)

    def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    torch.autograd.grad(glu.glu(gate, up), (gate, up), upstream)


@pytest.mark.parametrize("rank", [3, 40])
def test_glu_backward_of_a_sum_that_is_not_written_down(rank: int) -> None:
    rows, cols = 70, 150
    wide = _randn(rows, cols + rank + 5)
    dy, u, A, gate, up = (
        wide[:, :cols],
        wide[:, cols : cols + rank],
        _randn(rank, cols),
        _randn(rows, cols),
        _randn(cols, rows).t(),
    )
    expected = glu.backward(dy + u @ A, gate, up, "silu")
    for ours, theirs in zip(glu.low_rank_backward(dy, u, A, gate, up, "silu"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-1e4, -30.0, 0.0, 30.0, 1e4])
@pytest.mark.parametrize("variant", glu.VARIANTS)
def test_glu_of_large_values(variant: str, value: float) -> None:
    def make() -> numbers.Call:
        gate = torch.full((2, 3), value, device=DEVICE).requires_grad_()
        return (gate, _randn(2, 3).requires_grad_()), {"variant": variant}

    numbers.check(glu.glu, glu.reference, make, 2e-6)


@pytest.mark.parametrize("function", ["rms_norm", "glu", "rope"])
def test_second_derivative_raises(function: str) -> None:
    x = _randn(1, 2, 3, 4).requires_grad_()
    calls = {
        "rms_norm": lambda: rms_norm.rms_norm(x, _randn(4), 1e-6),
        "glu": lambda: glu.glu(x, x),
        "rope": lambda: rope.rope(x, x, _randn(1, 3, 4), _randn(1, 3, 4))[0],
    }
    y = calls[function]()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


LARGE = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_properties(DEVICE).total_memory < 60 * 2**30,
    reason="needs a GPU of 60 GiB: offsets beyond 32 bits",
)


def _assert_last_rows_agree(fn: Any, reference: Any, inputs: list[torch.Tensor], dim: int = 0) -> None:
    """Outputs and gradients of the last token, where offsets exceed 2**31, against those of the last token alone."""
    last = [t.detach().narrow(dim, t.shape[dim] - 1, 1).clone().requires_grad_() for t in inputs]
    whole, alone = numbers.as_tuple(fn(*inputs)), numbers.as_tuple(reference(*last))
    gradients = torch.autograd.grad(whole, inputs, whole), torch.autograd.grad(alone, last, alone)
    for a, b in zip((*whole, *gradients[0]), (*alone, *gradients[1]), strict=True):
        torch.testing.assert_close(a.narrow(dim, a.shape[dim] - 1, 1), b, rtol=2e-2, atol=2e-2)


def _large(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()


@LARGE
def test_rms_norm_beyond_32_bits() -> None:
    weight = _randn(4096, dtype=torch.bfloat16)
    _assert_last_rows_agree(
        lambda x: rms_norm.rms_norm(x, weight, 1e-6),
        lambda x: rms_norm.reference(x, weight, 1e-6),
        [_large(2**19 + 3, 4096)],
    )


@LARGE
@pytest.mark.parametrize("contiguous", [True, False])
def test_glu_beyond_32_bits(contiguous: bool) -> None:
    x = _large(2**16 + 3, 2**16)
    gate, up = (t.detach() for t in x.chunk(2, -1))
    inputs = [(t.contiguous() if contiguous else t).requires_grad_() for t in (gate, up)]
    _assert_last_rows_agree(glu.glu, glu.reference, inputs)


@LARGE
def test_rope_beyond_32_bits() -> None:
    angle = torch.rand(1, 2**19 + 3, 128, dtype=torch.bfloat16, device=DEVICE)
    q, k = _large(1, 2**19 + 3, 32, 128), _large(1, 2**19 + 3, 1, 128)

    def turn(fn: Any) -> Any:
        return lambda q, k: fn(q, k, angle[:, -q.shape[1] :].cos(), angle[:, -q.shape[1] :].sin(), unsqueeze_dim=2)

    _assert_last_rows_agree(turn(rope.rope), turn(rope.reference), [q, k], dim=1)
