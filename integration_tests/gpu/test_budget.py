"""The budget on a CUDA GPU, beside what PyTorch and the driver say."""

from __future__ import annotations

import os

import pytest
import torch

from sloth_backend import SlothConfig
from sloth_backend.budget import CONTEXT_BYTES, GIB, SPARE_MOST_BYTES, device_budget, measure_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
alone = pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other processes of the run use the device")
SLACK = GIB // 2
"""What other parts of the process may take or give back between two measurements."""


@alone
def test_the_budget_can_be_allocated() -> None:
    device = torch.device("cuda:0")
    held = torch.empty(GIB, dtype=torch.uint8, device=device)
    budget = device_budget(device, SlothConfig())
    assert budget is not None
    torch.cuda.empty_cache()
    rest = torch.empty(budget - torch.cuda.memory_allocated(device), dtype=torch.uint8, device=device)
    assert held.nbytes + rest.nbytes == pytest.approx(budget, abs=SLACK)
    assert torch.cuda.mem_get_info(device)[0] < SPARE_MOST_BYTES + SLACK
    del held, rest
    torch.cuda.empty_cache()


def test_a_share_set_in_pytorch_counts() -> None:
    device = torch.device("cuda:0")
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(8 * GIB / total, device)
        assert measure_cuda(device).share == pytest.approx(8 * GIB / total)
        assert device_budget(device, SlothConfig()) == pytest.approx(8 * GIB * 0.95, rel=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@alone
def test_the_driver_takes_what_is_assumed() -> None:
    """In a process without other users of the device: what neither the allocator holds nor is free is the driver's."""
    device = torch.device("cuda:0")
    x = torch.randn(512, 512, device=device, dtype=torch.bfloat16)
    (x @ x).sum().item()
    memory = measure_cuda(device)
    assert 0 < memory.total - memory.free - memory.reserved < CONTEXT_BYTES + SLACK
