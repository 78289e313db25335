"""LoRA linears: the numbers rule, PEFT's own layers, and what is computed, saved and refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from integration_tests import numbers
from integration_tests.peft_layers import compare_with_peft, linears_of, siblings
from sloth_kernels import launch
from sloth_kernels.adapters import Adapter, LoraLinear, flattened, operands_of
from sloth_kernels.frozen_weight import DenseWeight, Weight, Weight4bit
from sloth_kernels.op import Case
from sloth_kernels.ops import lora, nf4

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
ALL_DTYPES = (torch.float64, *launch.TRITON_DTYPES)
CASES = pytest.mark.parametrize("case", lora.cases(), ids=lambda case: case.name)


def _dtype_name(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * std).to(dtype)


def _linear(n_in: int, n_out: int, rank: int = 4, dtype: torch.dtype = torch.float32, scale: float = 0.5) -> LoraLinear:
    A_RK = _randn(rank, n_in, seed=1, dtype=dtype).requires_grad_()
    B_NR = _randn(n_out, rank, seed=2, dtype=dtype).requires_grad_()
    return LoraLinear(DenseWeight(_randn(n_out, n_in, dtype=dtype)), None, [Adapter(A_RK, B_NR, scale)])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=_dtype_name)
@CASES
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    op = lora.OP
    numbers.check(op.fn, op.reference, lambda: case.make(dtype, DEVICE), op.tolerance[dtype])


@pytest.mark.parametrize("fn", [lora.OP.fn, lora.OP.reference], ids=["ours", "reference"])
@CASES
def test_finite_differences(case: Case, fn: Callable[..., Any]) -> None:
    args, kwargs = case.make(torch.float64, DEVICE)
    trained = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]

    def differentiable(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        placed = {id(old): new for old, new in zip(trained, leaves, strict=True)}
        return fn(*(placed.get(id(arg), arg) for arg in args), **kwargs)

    assert torch.autograd.gradcheck(differentiable, tuple(trained), fast_mode=True)


# PEFT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_4bit", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "ranks"),
    [
        (torch.float32, torch.float32, [8]),
        (torch.float32, torch.float32, [33, 1]),
        (torch.bfloat16, torch.bfloat16, [8]),
        (torch.bfloat16, torch.bfloat16, [8, 4]),
        (torch.bfloat16, torch.float32, [8, 4]),
        (torch.float16, torch.float16, [8]),
        (torch.float16, torch.float32, [8]),
    ],
    ids=lambda value: _dtype_name(value) or str(value),
)
def test_equals_peft(
    dtype: torch.dtype, adapter_dtype: torch.dtype, ranks: list[int], bias: bool, in_4bit: bool
) -> None:
    options = {"compute_dtype": dtype} if in_4bit else {}
    model = siblings(
        64, [48, 32, 32], dtype, device=DEVICE, in_4bit=in_4bit, bias=bias, ranks=ranks,
        adapter_dtype=adapter_dtype, rslora=len(ranks) > 1, **options,
    )  # fmt: skip
    x = _randn(3, 5, 64, dtype=dtype).requires_grad_()
    compare_with_peft(model, x, lora.OP.tolerance[dtype])


@pytest.mark.parametrize("in_4bit", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=_dtype_name)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=_dtype_name)
def test_equals_peft_under_autocast(x_dtype: torch.dtype, adapter_dtype: torch.dtype, in_4bit: bool) -> None:
    """x in float32 is what norms with float32 weights hand on."""
    options = {"compute_dtype": torch.bfloat16, "quant_type": "fp4"} if in_4bit else {}
    model = siblings(
        64, [48, 32], torch.bfloat16, device=DEVICE, in_4bit=in_4bit, bias=True, ranks=[8, 4],
        adapter_dtype=adapter_dtype, **options,
    )  # fmt: skip
    x = _randn(3, 5, 64, dtype=x_dtype).requires_grad_()
    compare_with_peft(model, x, lora.OP.tolerance[torch.bfloat16], autocast=torch.bfloat16)


@pytest.mark.parametrize("in_4bit", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("ranks", [[8], [8, 4]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, None),
    ],
    ids=lambda value: _dtype_name(value) or str(value),
)
def test_equals_peft_with_dropout(
    dtype: torch.dtype, adapter_dtype: torch.dtype, autocast: torch.dtype | None, ranks: list[int], in_4bit: bool
) -> None:
    """In float64 the masks are the same."""
    options = {"compute_dtype": dtype} if in_4bit else {}
    model = siblings(
        64, [48, 32, 32], dtype, device=DEVICE, in_4bit=in_4bit, ranks=ranks, adapter_dtype=adapter_dtype,
        dropout=0.25, **options,
    )  # fmt: skip
    x = _randn(3, 5, 64, dtype=dtype).requires_grad_()
    compare_with_peft(model, x, lora.OP.tolerance[dtype], autocast)


def test_4bit_weights_are_dequantised_in_the_product_dtype() -> None:
    model = siblings(64, [48], torch.bfloat16, device=DEVICE, in_4bit=True, compute_dtype=torch.float32)
    (linear,) = linears_of(model)
    assert isinstance(linear.weight, Weight4bit)
    assert linear.weight.dtypes(torch.bfloat16, None) == (torch.float32, torch.bfloat16)
    dense = linear.weight.dense(torch.float16)
    assert torch.equal(dense, nf4.reference(*linear.weight.quantized, dtype=torch.float16))
    compare_with_peft(model, _randn(7, 64, dtype=torch.bfloat16).requires_grad_(), 4e-3)


# What is computed and saved -------------------------------------------------------------------------------------------


class _Counted(TorchDispatchMode):
    """Counts what reaches the dispatcher, by name."""

    def __enter__(self) -> _Counted:
        self.calls: list[str] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul") for name in self.calls)

    @property
    def copies(self) -> int:
        return sum(name in ("clone", "copy_", "_to_copy", "contiguous", "cat", "add", "mul") for name in self.calls)


class _CountedWeight:
    """A weight that counts how often it was asked for its matrix."""

    rounds_each: ClassVar[bool] = False

    trained = None

    def __init__(self, weight: torch.Tensor) -> None:
        self.inner = DenseWeight(weight)
        self.shape = weight.shape
        self.asked = 0

    def dtypes(self, x: torch.dtype, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
        return self.inner.dtypes(x, autocast)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        self.asked += 1
        return self.inner.dense(dtype)


def _count(linears: Sequence[LoraLinear], x: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Products, copies and casts, and matrices asked for: in the forward and in the backward."""
    weights = [_CountedWeight(linear.weight.dense(x.dtype)) for linear in linears]
    counted_linears = [linear._replace(weight=weight) for linear, weight in zip(linears, weights, strict=True)]
    with _Counted() as forward:
        ys = lora.lora_linears(x, counted_linears)
    asked = sum(weight.asked for weight in weights)
    inputs = [t for t in (x, *flattened(operands_of(linears))) if t is not None and t.requires_grad]
    upstream = [torch.ones_like(y) for y in ys]
    with _Counted() as backward:
        torch.autograd.grad(ys, inputs, upstream)
    asked_again = sum(weight.asked for weight in weights) - asked
    return (forward.products, backward.products), (forward.copies, backward.copies), (asked, asked_again)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_products(n: int) -> None:
    """Forward: t, and two for each sibling. Backward: u, dB and dy W for each, then dA and u A for all of them."""
    linears = [_linear(16, 8 + i) for i in range(n)]
    x = _randn(2, 5, 16).requires_grad_()
    products, copies, asked = _count(linears, x)
    assert products == (1 + 2 * n, 3 * n + 2)
    assert copies == (int(n > 1), int(n > 1))  # the A of several siblings are put together
    assert asked == (n, n)


@pytest.mark.parametrize("n", [1, 3])
def test_first_layer_needs_no_weight_in_the_backward(n: int) -> None:
    products, copies, asked = _count([_linear(16, 8) for _ in range(n)], _randn(5, 16))
    assert products == (1 + 2 * n, 2 * n + 1)
    assert copies == (int(n > 1), 0)
    assert asked == (n, 0)


def test_frozen_adapters_cost_no_gradient() -> None:
    linear = _linear(16, 8)
    for adapter in linear.adapters:
        adapter.A_RK.requires_grad_(False)
        adapter.B_NR.requires_grad_(False)
    products, copies, asked = _count([linear, linear], _randn(5, 16).requires_grad_())
    assert products == (5, 2 + 2 + 1)
    assert copies == (1, 1)
    assert asked == (2, 2)


def test_layouts_that_a_product_walks_are_not_copied() -> None:
    x = _randn(4, 5, 40)[..., 8:24].requires_grad_()
    assert _count([_linear(16, 8)], x)[1] == (0, 0)


def _saved(x: torch.Tensor, linears: Sequence[LoraLinear]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        lora.lora_linears(x, linears)
    return sorted(shapes)


def test_saves_x_once_and_t() -> None:
    linears = [_linear(16, 8), _linear(16, 9, rank=3)]
    x = _randn(2, 5, 16).requires_grad_()
    parameters = [(4, 16), (8, 4), (3, 16), (9, 3)]
    assert _saved(x, linears) == sorted([(2, 5, 16), (10, 7), *parameters])
    for linear in linears:
        linear.adapters[0].B_NR.requires_grad_(False)
    assert _saved(x, linears) == sorted([(2, 5, 16), *parameters])
    for linear in linears:
        linear.adapters[0].A_RK.requires_grad_(False)
    assert _saved(x, linears) == sorted(parameters)


def test_without_gradients() -> None:
    x, linear = _randn(3, 16).requires_grad_(), _linear(16, 8)
    with torch.no_grad():
        (quiet,) = lora.lora_linears(x, [linear])
        assert _saved(x, [linear]) == []
    (y,) = lora.lora_linears(x, [linear])
    assert y.requires_grad
    assert not quiet.requires_grad
    assert torch.equal(y, quiet)


# What it promises beside ----------------------------------------------------------------------------------------------


def test_outputs_that_nothing_depends_on() -> None:
    linears, x = [_linear(16, 8), _linear(16, 8)], _randn(3, 16).requires_grad_()
    inputs = [x, *(adapter.A_RK for linear in linears for adapter in linear.adapters)]
    ours, stock = (
        torch.autograd.grad(fn(x, linears)[1].sum(), inputs, allow_unused=True)
        for fn in (lora.lora_linears, lora.reference)
    )
    assert ours[1] is None
    assert stock[1] is None
    for a, b in ((ours[0], stock[0]), (ours[2], stock[2])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (1, 1, 16)])
def test_shapes(shape: tuple[int, ...]) -> None:
    linears, x = [_linear(16, 8), _linear(16, 4)], _randn(*shape).requires_grad_()
    ours, stock = lora.lora_linears(x, linears), lora.reference(x, linears)
    assert [tuple(y.shape) for y in ours] == [(*shape[:-1], 8), (*shape[:-1], 4)]
    inputs = [x, *(t for t in flattened(operands_of(linears)) if t is not None)]
    gradients = [torch.autograd.grad(sum(y.sum() for y in ys), inputs) for ys in (ours, stock)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_results_may_be_changed_in_place() -> None:
    linears, x = [_linear(16, 8), _linear(16, 8)], _randn(3, 16).requires_grad_()
    first, second = lora.lora_linears(x, linears)
    first.clamp_(-1, 1)
    (first + second.mul_(2)).sum().backward()
    adapter = linears[0].adapters[0]
    assert adapter.A_RK.grad is not None
    adapter.A_RK.grad.div_(2)
    expected = torch.autograd.grad(lora.reference(x, linears)[1].sum() * 2, linears[1].adapters[0].A_RK)[0]
    torch.testing.assert_close(linears[1].adapters[0].A_RK.grad, expected)


def test_gradients_accumulate() -> None:
    linear, x = _linear(16, 8), _randn(3, 16).requires_grad_()
    for _ in range(2):
        lora.lora_linears(x, [linear])[0].sum().backward()
    once = torch.autograd.grad(lora.reference(x, [linear])[0].sum(), linear.adapters[0].A_RK)[0]
    torch.testing.assert_close(linear.adapters[0].A_RK.grad, 2 * once)


def test_checkpointing() -> None:
    linear, x = _linear(16, 8), _randn(3, 16).requires_grad_()
    inputs = [x, *linear.adapters[0][:2]]
    y = checkpoint(lambda x: lora.lora_linears(x, [linear])[0], x, use_reentrant=False)
    plain = lora.lora_linears(x, [linear])[0]
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0, 1500.0, 6000.0])
def test_float16_overflows_no_earlier_than_stock(size: float) -> None:
    weight = DenseWeight(_randn(16, 64, dtype=torch.float16, std=0.05))
    linears = [_linear(64, 16, 8, torch.float16, scale=0.02)._replace(weight=weight) for _ in range(2)]
    x = _randn(9, 64, dtype=torch.float16, std=size).requires_grad_()
    inputs = [x, *(t for t in flattened(operands_of(linears)) if t is not None)]
    results = []
    for fn in (lora.lora_linears, lora.reference):
        ys = fn(x, linears)
        upstream = [torch.full_like(y, size / 10) for y in ys]
        results.append([*ys, *torch.autograd.grad(ys, inputs, upstream)])
    finite = [torch.stack([t.isfinite().all() for t in tensors]) for tensors in results]
    assert (finite[0] | ~finite[1]).all()
    if size == 1500.0:
        assert finite[0][0]
        assert not finite[1][0], "stock multiplies by the scale after float16 has overflowed"


def test_conv1d_weights_are_views() -> None:
    weight_KN = _randn(16, 8)
    linear = _linear(16, 8)._replace(weight=DenseWeight(weight_KN.t()))
    x = _randn(3, 16).requires_grad_()
    (ours,), (stock,) = lora.lora_linears(x, [linear]), lora.reference(x, [linear])
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(stock.sum(), x))


def test_second_derivative_raises() -> None:
    linear, x = _linear(16, 8), _randn(3, 16).requires_grad_()
    (y,) = lora.lora_linears(x, [linear])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_errors() -> None:
    linear, x = _linear(16, 8), _randn(3, 16)
    adapter = linear.adapters[0]
    broken = {
        r"needs x of 16 columns, got 12": (x[:, :12], linear),
        r"needs a bias \(8,\), got \(16,\)": (x, linear._replace(bias_N=_randn(16))),
        r"needs an adapter of A \(r, 16\) and B \(8, r\)": (
            x,
            linear._replace(adapters=[adapter._replace(B_NR=_randn(8, 3))]),
        ),
    }
    for message, (bad_x, bad_linear) in broken.items():
        with pytest.raises(ValueError, match=message):
            lora.lora_linears(bad_x, [bad_linear])
    with pytest.raises(RuntimeError, match=r"x is torch\.float16 and the weight torch\.float32"):
        lora.lora_linears(x.half(), [linear])
    packed = nf4.cases()[-2].make(torch.float32, DEVICE)[0]
    with pytest.raises(ValueError, match="two dimensions"):
        Weight4bit(nf4.Quantized4bit(*packed))


def test_weights_of_ones_own() -> None:
    """Anything with the protocol's five members is a weight."""
    weight: Weight = _CountedWeight(_randn(8, 16))
    x = _randn(3, 16)
    (y,) = lora.lora_linears(x, [LoraLinear(weight)])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.dense(torch.float32)))
