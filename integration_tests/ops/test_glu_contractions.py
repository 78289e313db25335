"""The gated unit's backward with the products of the linears around it, against the same as products of their own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from integration_tests import numbers
from sloth_kernels import glu_contractions, launch
from sloth_kernels.glu_contractions import Contractions, Tile
from sloth_kernels.gradients import LowRankSum
from sloth_kernels.ops import glu

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if launch.interpreting() else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
ONE_ROUNDING = {torch.bfloat16: 2.0**-9}
"""Of a single row's few values, what one that is rounded the other way moves their norm by."""
SMALL = Tile(16, 16, 3, 1, 2)
"""So that few rows are several tiles, and several splits."""


class Given(NamedTuple):
    """One call's tensors."""

    dh: LowRankSum
    gate: torch.Tensor
    up: torch.Tensor
    gate_t: torch.Tensor
    up_t: torch.Tensor

    def to(self, dtype: torch.dtype) -> Given:
        dy, u, A, *_ = (t.to(dtype) for t in self.dh[:3] if t is not None)
        return Given(LowRankSum(dy, u, A), *(t.to(dtype) for t in self[1:]))


def given(rows: int, cols: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> Given:
    """dy and u side by side in one matrix, as a product leaves them; so are the two t."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=DEVICE, generator=generator).to(dtype)

    rank, gate_rank, up_rank = ranks
    joined, inner = randn(rows, cols + rank + 5), randn(rows, gate_rank + up_rank)
    dh = LowRankSum(joined[:, :cols], joined[:, cols : cols + rank], randn(rank, cols) * 0.3)
    return Given(dh, randn(rows, cols), randn(rows, cols), inner[:, :gate_rank], inner[:, gate_rank:])


def apart(call: Given, variant: str) -> dict[str, torch.Tensor]:
    """dgate, dup and each product by itself, which reads them rounded."""
    dh, gate, up, gate_t, up_t = call
    if gate.dtype == torch.float64:
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        h = glu.reference(*leaves, variant)
        dgate, dup = torch.autograd.grad(h, leaves, dh.sum())
        h = h.detach()
    else:
        dgate, dup = glu.low_rank_backward(*dh[:3], gate, up, variant)  # type: ignore[misc]
        h = glu.forward(gate, up, variant)
    return {
        "dgate": dgate,
        "dup": dup,
        "gate_IR": dgate.t() @ gate_t,
        "up_IR": dup.t() @ up_t,
        "h_IR": h.t() @ dh.u_TR,
    }


def together(call: Given, variant: str, tile: Tile) -> dict[str, torch.Tensor]:
    made = glu_contractions.backward(*call[:3], variant, call.gate_t, call.up_t, True, False, tile)
    return {name: tensor for name, tensor in made._asdict().items() if tensor is not None}


def assert_numbers(call: Given, variant: str, tile: Tile) -> None:
    mine, stock, truth = together(call, variant, tile), apart(call, variant), apart(call.to(torch.float64), variant)
    assert mine.keys() == stock.keys()
    tolerance = max(TOLERANCE[call.gate.dtype], ONE_ROUNDING.get(call.gate.dtype, 0.0) if len(call.gate) == 1 else 0.0)
    found = numbers.errors(*(numbers.Evaluation(t, {}) for t in (mine, stock, truth)), tolerance)
    assert not [str(error) for error in found if not error.holds]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "ranks"),
    [(1, 5, (1, 1, 1)), (1, 5, (3, 40, 8)), (50, 37, (3, 40, 8)), (50, 37, (48, 16, 33)), (48, 32, (32, 32, 32))],
)
def test_products(rows: int, cols: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Less than a tile; tiles with a tail, of which one split takes two; whole tiles. Ranks up to a block."""
    assert_numbers(given(rows, cols, ranks, dtype), "silu", SMALL)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("variant", glu.VARIANTS)
def test_splits_and_variants(variant: str, splits: int) -> None:
    assert_numbers(given(35, 20, (4, 6, 2), torch.float32), variant, SMALL._replace(splits=splits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tile_that_is_used(dtype: torch.dtype) -> None:
    assert_numbers(given(170, 70, (8, 16, 5), dtype), "silu", glu_contractions.TILE)


@pytest.mark.parametrize("asked", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_asked_for(asked: tuple[bool, bool, bool]) -> None:
    call = given(50, 21, (3, 4, 5), torch.float32)
    full = glu_contractions.backward(*call[:3], "silu", call.gate_t, call.up_t, True, False, SMALL)
    ts = (t if wanted else None for t, wanted in zip((call.gate_t, call.up_t), asked, strict=False))
    some = glu_contractions.backward(*call[:3], "silu", *ts, asked[2], False, SMALL)
    for wanted, mine, whole in zip((True, True, *asked), some, full, strict=True):
        assert (mine is not None) == wanted
        assert mine is None or torch.equal(mine, whole)


@pytest.mark.parametrize("overwrite", [False, True])
def test_where_the_gradients_lie(overwrite: bool) -> None:
    """In the memory of gate and up, where those may be overwritten and are contiguous; the numbers are the same."""
    call = given(50, 21, (3, 4, 5), torch.float32)
    expected = together(call, "silu", SMALL)
    for gate in (call.gate.clone(), call.gate.t().contiguous().t()):
        up, rest = call.up.clone(), ("silu", call.gate_t, call.up_t, True, overwrite, SMALL)
        made = glu_contractions.backward(call.dh, gate, up, *rest)
        assert (made.dup is up) == (overwrite and gate.is_contiguous())
        assert made.dgate.is_contiguous()
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(made, name), tensor, rtol=0, atol=0)


def test_the_same_each_time() -> None:
    call = given(170, 37, (8, 8, 8), torch.float32)
    first, second = (glu_contractions.backward(*call[:3], "silu", call.gate_t, None, True) for _ in range(2))
    assert torch.equal(torch.cat(_products(first)), torch.cat(_products(second)))


def _products(made: Contractions) -> list[torch.Tensor]:
    return [product for product in made[2:] if product is not None]
