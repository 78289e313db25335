"""Random shapes, strides and variants of the elementwise and row-wise ops, against the numbers rule."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from integration_tests import numbers
from sloth_kernels import launch
from sloth_kernels.ops import glu, rms_norm, rope

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
# No shrinking: an interpreted kernel is slow, and the first failing example is small enough to read.
FEW = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
SMALL = st.integers(1, 4)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator)


@st.composite
def _strided(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """A function that makes a tensor of ``shape`` with permuted, padded, stepped or repeated dimensions."""
    order = draw(st.permutations(range(len(shape))))
    pads = draw(st.tuples(*[st.integers(0, 2)] * len(shape)))
    steps = draw(st.tuples(*[st.sampled_from((1, 1, 1, 2))] * len(shape)))
    repeated = draw(st.sampled_from((None, None, *range(len(shape) - 1))))

    def make(seed: int) -> torch.Tensor:
        sizes = [(shape[i] * steps[i] + pads[i]) if i != repeated else 1 for i in order]
        base = _randn(*sizes, seed=seed).permute(*(list(order).index(i) for i in range(len(shape))))
        slices = tuple(
            slice(None) if i == repeated else slice(pads[i], pads[i] + shape[i] * steps[i], steps[i])
            for i in range(len(shape))
        )
        return base[slices].expand(shape).detach().requires_grad_()

    return make


@FEW
@given(data=st.data(), variant=st.sampled_from(rms_norm.VARIANTS), width=st.integers(2, 140), trained=st.booleans())
def test_rms_norm(data: st.DataObject, variant: str, width: int, trained: bool) -> None:
    shape = (*data.draw(st.lists(SMALL, min_size=1, max_size=3)), width)
    make_x = data.draw(_strided(shape))

    def make() -> numbers.Call:
        return (make_x(0), _randn(width, seed=1).requires_grad_(trained), 1e-6), {"variant": variant}

    numbers.check(rms_norm.rms_norm, rms_norm.reference, make, 2e-6)


@FEW
@given(data=st.data(), variant=st.sampled_from(glu.VARIANTS))
def test_glu(data: st.DataObject, variant: str) -> None:
    shape = (*data.draw(st.lists(SMALL, min_size=1, max_size=3)), data.draw(st.integers(1, 140)))
    make_gate, make_up = data.draw(_strided(shape)), data.draw(_strided(shape))
    numbers.check(glu.glu, glu.reference, lambda: ((make_gate(0), make_up(1)), {"variant": variant}), 2e-6)


@FEW
@given(
    data=st.data(),
    variant=st.sampled_from(rope.VARIANTS),
    unsqueeze_dim=st.sampled_from((1, 2)),
    half=st.integers(1, 20),
    rest=st.integers(0, 9),
    shared=st.booleans(),
)
def test_rope(data: st.DataObject, variant: str, unsqueeze_dim: int, half: int, rest: int, shared: bool) -> None:
    batch, seq, q_heads, k_heads = (data.draw(st.integers(1, 3)) for _ in range(4))

    def shape(heads: int) -> tuple[int, ...]:
        return (batch, heads, seq, 2 * half + rest) if unsqueeze_dim == 1 else (batch, seq, heads, 2 * half + rest)

    make_q, make_k = data.draw(_strided(shape(q_heads))), data.draw(_strided(shape(k_heads)))
    entries = half if rope.ROTATIONS[variant].angles == "pair" else 2 * half

    def make() -> numbers.Call:
        cos, sin = (_randn(1 if shared else batch, seq, entries, seed=seed) for seed in (2, 3))
        return (make_q(0), make_k(1), cos, sin), {"variant": variant, "unsqueeze_dim": unsqueeze_dim}

    numbers.check(rope.rope, rope.reference, make, 2e-6)
