"""What linear_cross_entropy promises beyond its numbers: no T x V logits, no work on ignored rows or frozen weights,
gradients that do not depend on chunks or on how the loss is scaled, and plain errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from integration_tests import numbers
from sloth_kernels import launch
from sloth_kernels.ops import linear_cross_entropy as op
from sloth_kernels.ops.linear_cross_entropy import OP, linear_cross_entropy, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not launch.interpreting() else "cpu")
KERNEL_RUNS = DEVICE.type == "cuda" or launch.interpreting()
KERNEL_DTYPES = launch.INTERPRETER_DTYPES if launch.interpreting() else launch.TRITON_DTYPES
PRODUCTS = ("aten::mm", "aten::addmm", "aten::matmul", "aten::linear")

# The interpreter computes the masked columns too, on whatever the padding holds.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=["kernel", "torch"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to take a chunk's rows, where both run."""
    if request.param == "kernel" and not KERNEL_RUNS:
        pytest.skip("kernels need a GPU or TRITON_INTERPRET=1")
    if request.param == "torch":
        monkeypatch.setattr(op, "runs_triton", lambda *tensors: False)
    return request.param


class Trace(TorchDispatchMode):
    """Records each operation's name, arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func._schema.name, args, result))
        return result

    def products(self) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of each matrix product."""
        matrices = [
            [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2][-2:]
            for name, args, _ in self.calls
            if name in PRODUCTS
        ]
        return [(left.shape[0], left.shape[1], right.shape[1]) for left, right in matrices]

    def largest(self) -> int:
        """Bytes of the largest tensor that any operation returned."""
        results = (
            r for _, _, result in self.calls for r in (result if isinstance(result, tuple | list) else (result,))
        )
        return max(r.nbytes for r in results if isinstance(r, torch.Tensor))


def make(
    n_tokens: int = 24,
    n_hidden: int = 16,
    n_vocab: int = 100,
    *,
    dtype: torch.dtype = torch.float32,
    ignored: int = 0,
    trained: str = "hw",
    seed: int = 0,
) -> list[torch.Tensor]:
    """hidden, weight and labels, of which every ``ignored``-th has none."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, n_hidden, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(n_vocab, n_hidden, generator=generator) / n_hidden**0.5).to(DEVICE, dtype)
    labels = torch.randint(n_vocab, (n_tokens,), generator=generator).to(DEVICE)
    if ignored:
        labels[::ignored] = -100
    return [hidden.requires_grad_("h" in trained), weight.requires_grad_("w" in trained), labels]


def gradients(inputs: list[torch.Tensor], loss: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], **kwargs))


def test_ignored_rows_reach_no_product(rows: str) -> None:
    hidden, weight, labels = make(30, 16, 100, ignored=3)
    with Trace() as trace:
        loss = linear_cross_entropy(hidden, weight, labels).loss_sum
        gradients([hidden, weight], loss)
    assert sorted(trace.products()) == sorted([(20, 16, 100), (20, 100, 16), (100, 20, 16)])


@pytest.mark.parametrize(
    ("trained", "products"),
    [("", [(24, 16, 100)]), ("h", [(24, 16, 100), (24, 100, 16)]), ("w", [(24, 16, 100), (100, 24, 16)])],
)
def test_only_needed_gradients_are_computed(rows: str, trained: str, products: list[tuple[int, int, int]]) -> None:
    hidden, weight, labels = make(trained=trained)
    with Trace() as trace:
        loss = linear_cross_entropy(hidden, weight, labels).loss_sum
        if trained:
            gradients([hidden, weight], loss)
    assert trace.products() == products


def test_no_grad_computes_no_gradient(rows: str) -> None:
    hidden, weight, labels = make(ignored=4)
    with torch.no_grad(), Trace() as trace:
        sums = linear_cross_entropy(hidden, weight, labels)
    assert trace.products() == [(18, 16, 100)]
    assert not sums.loss_sum.requires_grad
    for ours, true in zip(sums, reference(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours, true.detach())


@pytest.mark.parametrize("ignored", [0, 3])
def test_never_holds_all_logits(rows: str, ignored: int) -> None:
    hidden, weight, labels = make(64, 8, 1000, ignored=ignored)
    with Trace() as trace:
        loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=8).loss_sum
        gradients([hidden, weight], loss)
    assert trace.largest() == 8 * 1024 * 4  # a chunk, its rows padded to a multiple of 64; W has 8,000 elements
    with Trace() as stock:
        gradients([hidden, weight], reference(hidden, weight, labels).loss_sum)
    assert stock.largest() >= 64 * 1000 * 4


def test_rounded_sums_take_no_second_weight_and_round_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their error is at most that of as many roundings as there are chunks; no float32 matrix of W's size is made."""
    monkeypatch.setattr(op, "runs_triton", lambda *tensors: False)
    chunks, (hidden, weight, labels) = 4, make(64, 96, 1000)
    exact = [t.detach().double().requires_grad_() for t in (hidden.bfloat16(), weight.bfloat16())]
    truth = gradients(exact, reference(*exact, labels).loss_sum)[1]
    errors = {}
    for rounded in (False, True):
        own = [t.detach().float().bfloat16().requires_grad_() for t in exact]
        with Trace() as trace:
            loss = linear_cross_entropy(*own, labels, chunk_rows=64 // chunks, rounded_sums=rounded).loss_sum
        errors[rounded] = ((gradients(own, loss)[1].double() - truth).norm() / truth.norm()).item()
        results = [result for _, _, result in trace.calls if isinstance(result, torch.Tensor)]
        wide = [t for t in results if t.dtype == torch.float32 and t.shape == weight.shape]
        assert bool(wide) is not rounded
    assert errors[True] <= errors[False] + chunks * torch.finfo(torch.bfloat16).eps / 2


def test_default_chunk_is_bounded(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts the plain torch pass's temporaries, so that its chunks are shorter."""
    monkeypatch.setattr(op, "LOGITS_BYTES", 38 * 1024 * 4)
    monkeypatch.setattr(op, "ROW_QUANTUM", 4)
    hidden, weight, labels = make(75, 8, 1000)
    with torch.no_grad(), Trace() as trace:
        linear_cross_entropy(hidden, weight, labels)
    assert [p[0] for p in trace.products()] == ([28, 28, 19] if rows == "kernel" else [4] * 18 + [3])


@given(n_rows=st.integers(0, 10**6), row_bytes=st.integers(1, 2**23))
def test_chunks_are_few_even_and_within_the_bound(n_rows: int, row_bytes: int) -> None:
    step = op.rows_per_chunk(n_rows, row_bytes)
    assert step % op.ROW_QUANTUM == 0
    assert step == op.ROW_QUANTUM or step * row_bytes <= op.LOGITS_BYTES
    fewest = launch.cdiv(n_rows, max(1, op.LOGITS_BYTES // row_bytes // op.ROW_QUANTUM) * op.ROW_QUANTUM)
    chunks = launch.cdiv(n_rows, step)
    assert chunks <= fewest
    assert not chunks or step - n_rows / chunks < op.ROW_QUANTUM * 2


@pytest.mark.parametrize("chunk_rows", [1, 5, 24, 1000])
def test_result_does_not_depend_on_chunks(rows: str, chunk_rows: int) -> None:
    dtype = torch.float64 if rows == "torch" else torch.float32
    hidden, weight, labels = make(dtype=dtype, ignored=7)
    bias = torch.linspace(-1, 1, 100, dtype=dtype, device=DEVICE).requires_grad_()
    kwargs: dict[str, Any] = {"scale": 0.7, "softcap": 4.0}
    whole = linear_cross_entropy(hidden, weight, labels, bias, **kwargs)
    split = linear_cross_entropy(hidden, weight, labels, bias, chunk_rows=chunk_rows, **kwargs)
    torch.testing.assert_close(split, whole)
    pairs = zip(*(gradients([hidden, weight, bias], s.loss_sum) for s in (split, whole)), strict=True)
    for ours, true in pairs:
        torch.testing.assert_close(ours, true)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(rows: str, data: st.DataObject) -> None:
    n_tokens, n_hidden, n_vocab = (data.draw(st.integers(low, high)) for low, high in ((0, 20), (1, 40), (1, 300)))
    hidden, weight, labels = make(n_tokens, n_hidden, n_vocab, ignored=data.draw(st.integers(0, 4)))
    kwargs = {
        "scale": data.draw(st.sampled_from([1.0, 0.25, 3.0])),
        "softcap": data.draw(st.sampled_from([None, 2.0, 30.0])),
        "chunk_rows": data.draw(st.sampled_from([None, 1, 6])),
    }
    call = ((hidden, weight, labels), kwargs)
    numbers.check(linear_cross_entropy, reference, lambda: call, OP.tolerance[torch.float32])


@pytest.mark.skipif(DEVICE.type != "cpu" or launch.interpreting(), reason="of products on a CPU")
def test_nothing_is_read_of_memory_that_nobody_wrote() -> None:
    """oneDNN rounds odd rows of bfloat16 up and multiplies what lies behind by 0."""
    hidden_TH, weight_VH = torch.randn(24, 48).bfloat16().requires_grad_(), torch.randn(99, 48).bfloat16()
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        sums = linear_cross_entropy(hidden_TH, weight_VH, torch.arange(24))
        sums.loss_sum.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.isfinite().all()


@pytest.mark.parametrize("num_items", [None, torch.tensor(17)])
def test_is_the_models_loss(rows: str, num_items: torch.Tensor | None) -> None:
    """Shifted by padding the labels, over ``num_items_in_batch`` or the number of labels: transformers' own loss."""
    hidden, weight, _ = make(2 * 9)
    labels = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[:, :3] = -100
    stock = ForCausalLMLoss((hidden @ weight.T).view(2, 9, 100), labels, 100, num_items_in_batch=num_items)
    sums = linear_cross_entropy(hidden, weight, F.pad(labels[:, 1:], (0, 1), value=-100).flatten())
    ours = sums.loss_sum / (sums.n_valid if num_items is None else num_items)
    torch.testing.assert_close(ours, stock)
    for mine, true in zip(gradients([hidden, weight], ours), gradients([hidden, weight], stock), strict=True):
        torch.testing.assert_close(mine, true)


def test_tied_weight_sums_both_gradients(rows: str) -> None:
    _, weight, labels = make()
    tokens = labels.roll(1)
    stock = F.cross_entropy(F.embedding(tokens, weight).tanh() @ weight.T, labels, reduction="sum")
    ours = linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, labels).loss_sum
    (mine,), (true,) = gradients([weight], ours), gradients([weight], stock)
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_linear_layer(rows: str, hidden_dtype: torch.dtype) -> None:
    hidden, weight, labels = make(64, 32, 200, ignored=5)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()

    def under_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return fn(*args, **kwargs)

        return call

    stock = under_autocast(reference)
    upstream = [torch.tensor(1 / 64)]
    call = ((hidden, weight, labels), {"chunk_rows": 20})
    ours, theirs = (numbers.evaluate(fn, call, upstream) for fn in (under_autocast(linear_cross_entropy), stock))
    truth = numbers.evaluate(reference, numbers.in_float64(call), upstream)
    numbers.assert_same_form(ours, theirs)
    broken = [str(e) for e in numbers.errors(ours, theirs, truth, OP.tolerance[torch.bfloat16]) if not e.holds]
    assert not broken, broken


def test_autocast_casts_the_weight_once(rows: str) -> None:
    hidden, weight, labels = make(40, trained="h")
    with torch.autocast(DEVICE.type, torch.bfloat16), Trace() as trace:
        linear_cross_entropy(hidden, weight, labels, chunk_rows=8)
    casts = [r for name, _, r in trace.calls if name == "aten::_to_copy" and r.shape == weight.shape]
    assert len(casts) == 1


def test_mixed_dtypes_are_refused_as_by_a_linear_layer() -> None:
    hidden, weight, labels = make()
    with pytest.raises(RuntimeError):
        F.linear(hidden.bfloat16(), weight)
    with pytest.raises(RuntimeError, match=r"one dtype, got \['torch.bfloat16', 'torch.float32'\]"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)


def test_float16_sums_that_exceed_its_range(rows: str) -> None:
    """dW of the sum is about 95,000 here; of the mean, which stock computes at once, 3,000."""
    hidden, weight, labels = make(32, 16, 64, dtype=torch.float16)
    hidden = (hidden.detach().abs() + 3000).requires_grad_()
    weight = (weight.detach() * 1e-4).requires_grad_()
    labels = torch.zeros_like(labels)

    def mean(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: fn(*args).loss_sum / 32

    assert gradients([weight], reference(hidden, weight, labels).loss_sum)[0].isinf().any()
    call = ((hidden, weight, labels), {})
    numbers.check(mean(linear_cross_entropy), mean(reference), lambda: call, OP.tolerance[torch.float16])


@pytest.mark.parametrize("factor", [2.0**17, 1 / 3])
def test_loss_scale_keeps_its_range(rows: str, factor: float) -> None:
    """2**17 is infinite in float16; times the gradients of this small head it is not."""
    hidden, weight, labels = make(dtype=torch.float16)
    inputs = [(t.detach() / 64).requires_grad_() for t in (hidden, weight)]
    scaled = gradients(inputs, linear_cross_entropy(inputs[0], inputs[1], labels).loss_sum * factor)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = gradients(exact, reference(exact[0], exact[1], labels).loss_sum * factor)
    for ours, true in zip(scaled, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0.0, atol=2e-3 * true.abs().max().item())


def test_kept_graph_gives_the_same_gradient_again(rows: str) -> None:
    hidden, weight, labels = make(ignored=5)
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    first = [g.clone() for g in gradients([hidden, weight], loss * 3, retain_graph=True)]
    second = gradients([hidden, weight], loss * 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients([hidden, weight], loss * 3)


def test_second_derivative_is_refused() -> None:
    """Also where the upstream gradient is a constant, for which torch's once_differentiable would silently give 0."""
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


@pytest.mark.parametrize("n_tokens", [0, 6])
def test_no_label_gives_zero_connected_to_the_graph(rows: str, n_tokens: int) -> None:
    hidden, weight, labels = make(n_tokens, ignored=1)
    bias = torch.zeros(100, device=DEVICE, requires_grad=True)
    sums = linear_cross_entropy(hidden, weight, labels, bias)
    assert [s.item() for s in sums] == [0, 0, 0, 0]
    sums.loss_sum.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_ignored_rows_may_hold_anything(rows: str) -> None:
    hidden, weight, labels = make(ignored=2)
    spoiled = hidden.detach().clone()
    spoiled[::2] = float("nan")
    spoiled.requires_grad_()
    clean, ours = (linear_cross_entropy(h, weight, labels) for h in (hidden, spoiled))
    assert torch.equal(clean.loss_sum, ours.loss_sum)
    pairs = zip(gradients([hidden, weight], clean.loss_sum), gradients([spoiled, weight], ours.loss_sum), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_statistics_of_known_predictions(rows: str) -> None:
    """Uniform rows: entropy log V, and only the first column counts as predicted. One certain row: entropy 0."""
    hidden, weight = torch.zeros(4, 8, device=DEVICE), torch.randn(50, 8, device=DEVICE)
    weight[7], hidden[3] = 30.0, 1.0
    labels = torch.tensor([0, 1, 49, 7], device=DEVICE)
    sums = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(sums.entropy_sum, 3 * torch.tensor(50.0, device=DEVICE).log())
    assert (sums.n_correct.item(), sums.n_valid.item()) == (2, 4)
    assert sums.n_correct.dtype == sums.n_valid.dtype == torch.int64


def test_many_hits_are_counted(rows: str) -> None:
    """Random labels almost never hit, so plant hits and near misses over several blocks of columns."""
    hidden, weight, labels = make(40, 32, 5000, trained="")
    hidden[::2] += 8 * weight[labels[::2]]
    sums, true = linear_cross_entropy(hidden, weight, labels, chunk_rows=16), reference(hidden, weight, labels)
    assert 15 <= true.n_correct.item() <= 25
    assert sums.n_correct.item() == true.n_correct.item()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_forbidden_and_extreme_logits(rows: str, softcap: float | None) -> None:
    """-inf forbids a token; ±1e4 leave float32's exponent range unless the maximum is taken out."""
    hidden, weight, labels = make(12, 16, 100)
    labels[:] = torch.arange(12, device=DEVICE)
    bias = torch.zeros(100, device=DEVICE)
    bias[20:40], bias[40:60], bias[60] = float("-inf"), -1e4, 1e4
    ours, true = (
        fn(hidden, weight, labels, bias, softcap=softcap, **kwargs)
        for fn, kwargs in ((linear_cross_entropy, {"chunk_rows": 5}), (reference, {}))
    )
    torch.testing.assert_close(ours, true)
    pairs = zip(*(gradients([hidden, weight], s.loss_sum) for s in (ours, true)), strict=True)
    for mine, grad in pairs:
        torch.testing.assert_close(mine, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", [0, 57])
def test_a_logit_that_is_nan_makes_its_rows_loss_nan(rows: str, at: int) -> None:
    hidden, weight, labels = make(6, trained="h")
    labels[:] = 3
    bias = torch.zeros(100, device=DEVICE)
    bias[at] = float("nan")
    sums = linear_cross_entropy(hidden, weight, labels, bias)
    assert sums.loss_sum.isnan()
    assert gradients([hidden], sums.loss_sum)[0].isnan().any()


@pytest.mark.parametrize("label", [-1, -100, 100, 10**12])
def test_labels_out_of_range(rows: str, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make(6, trained="h")
    labels[2] = label
    if rows == "torch" and DEVICE.type == "cuda":
        pytest.skip("plain torch on a GPU fails a device-side assertion, which ends the process")
    if rows == "torch":
        with pytest.raises(IndexError, match=rf"Target {label} is out of bounds"):
            linear_cross_entropy(hidden, weight, labels, ignore_index=-7)
        return
    sums = linear_cross_entropy(hidden, weight, labels, ignore_index=-7)
    (grad,) = gradients([hidden], sums.loss_sum)
    assert sums.loss_sum.isnan()
    assert grad.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert sums.n_valid.item() == 6


def bad_calls() -> list[Any]:
    hidden, weight, labels = make(6, trained="")
    return [
        pytest.param((hidden[None], weight, labels), {}, "flatten leading dimensions", id="three dimensions"),
        pytest.param((hidden[:, 1:], weight, labels), {}, r"got \(6, 15\) and \(100, 16\)", id="hidden size"),
        pytest.param((hidden, weight, labels[1:]), {}, "expected 6 int64 labels", id="number of labels"),
        pytest.param((hidden, weight, labels.int()), {}, "got torch.int32", id="dtype of labels"),
        pytest.param((hidden, weight, labels, weight[1:, 0]), {}, r"expected bias \(100,\)", id="bias"),
        pytest.param((hidden, weight, labels), {"softcap": 0.0}, "softcap must be positive", id="softcap"),
        pytest.param((hidden, weight, labels), {"chunk_rows": 0}, "chunk_rows must be at least 1", id="chunk_rows"),
    ]


@pytest.mark.parametrize(("args", "kwargs", "message"), bad_calls())
def test_errors_say_what_was_expected(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args, **kwargs)


def test_loss_may_be_divided_in_place(rows: str) -> None:
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    loss /= 24
    torch.testing.assert_close(loss, reference(hidden, weight, labels).loss_sum / 24)
    assert gradients([hidden], loss)[0].any()


@pytest.mark.skipif(not KERNEL_RUNS, reason="kernels need a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("n_vocab", [1, 2047, 2048, 2049, 4100])
def test_block_edges_in_every_dtype(dtype: torch.dtype, n_vocab: int) -> None:
    """Several chunks of a trained head: on a GPU in bf16 and fp16 their dW is summed by mixed products."""
    call = (make(13, 24, n_vocab, dtype=dtype, ignored=6), {"chunk_rows": 5, "softcap": 20.0})
    numbers.check(linear_cross_entropy, reference, lambda: (tuple(call[0]), call[1]), OP.tolerance[dtype])
