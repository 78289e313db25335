"""The untrained-embedding fix at the size of Llama 3 8B's embedding, on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sloth_backend.findings import Edits
from sloth_plugins.embedding_fix import Matrix, fix, untrained_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def timed(work: Callable[[], object]) -> float:
    """Seconds on the GPU's clock, the wait for it included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_287_rows_of_llama_3_on_a_gpu(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(128_256, 4096, generator=generator, device="cuda", dtype=dtype)
    rows = torch.randperm(128_256, generator=generator, device="cuda")[:287].sort().values
    weight[rows] = torch.randn(287, 4096, generator=generator, device="cuda").mul(1e-23).to(dtype)
    kept = torch.ones(128_256, dtype=torch.bool, device="cuda")
    kept[rows] = False
    truth = torch.stack(
        [part[k].double().sum(0) for part, k in zip(weight.split(8192), kept.split(8192), strict=True)]
    ).sum(0)
    assert torch.equal(untrained_rows(weight, 1e-16), rows)
    before = weight.clone()
    matrix = Matrix(["w"], nn.Parameter(weight, requires_grad=False))
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    assert timed(lambda: fix(matrix, 1e-16, Edits())) < 1.0
    assert torch.cuda.max_memory_allocated() - base < 256 << 20
    # Two float64 sums in different orders may round to neighbours.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight[rows[0]], (truth / (128_256 - 287)).to(dtype), rtol=eps, atol=0)
    assert torch.equal(weight[kept], before[kept])
