"""Kernels launched directly give what Triton's own launch gives, whatever changes between calls."""

from __future__ import annotations

import pytest
import torch

from sloth_kernels.ops import glu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("shape", [(1, 33), (7, 128), (16, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_call_is_right(start: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Aligned or not, of any width: the second call of each kind goes past Triton's launcher."""
    n = shape[0] * shape[1]
    for seed in range(3):
        torch.manual_seed(seed)
        gate, up = (torch.randn(n + start, device="cuda", dtype=dtype)[start:].view(shape) for _ in range(2))
        expected = glu.reference(gate.double(), up.double())
        torch.testing.assert_close(glu.forward(gate, up, "silu").double(), expected, rtol=1e-2, atol=1e-2)


def test_calls_are_launched_directly() -> None:
    """Otherwise this Triton's compiled kernels are not what the launcher takes them for."""
    gate = torch.randn(4, 64, device="cuda")
    before = len(glu._glu_forward_kernel.compiled)
    glu.forward(gate, gate, "gelu")
    assert len(glu._glu_forward_kernel.compiled) == before + 1
    glu.forward(gate, gate, "gelu")
    assert len(glu._glu_forward_kernel.compiled) == before + 1
