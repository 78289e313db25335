"""Where linear_cross_entropy's time goes: the whole op, its matrix products alone, its row pass, and its extra memory.

Prints one JSON object; needs a CUDA GPU. ``--sweep`` times the row kernel for other blocks, warps and stages.

usage: python integration_tests/benchmarks/linear_cross_entropy.py [--dtype bfloat16] [--chunks 1024,2048] [--sweep]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from sloth_kernels import cross_entropy_rows
from sloth_kernels.ops.linear_cross_entropy import linear_cross_entropy, timings

CUDA = torch.device("cuda:0")


def main() -> None:
    """Measure every timing of the op and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--chunks", default="", help="rows a chunk to compare with the default, separated by commas")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    chunks = [None, *(int(rows) for rows in options.chunks.split(",") if rows)]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": options.dtype,
    }
    result["op"] = [measure(timing, dtype, rows) for timing in timings() for rows in chunks]
    if options.sweep:
        result["row_kernel_128k"] = sweep(dtype)
    print(json.dumps(result, indent=1))


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median of ``repeats`` runs after three to warm up."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[3:]), 3)


def measure(timing: Any, dtype: torch.dtype, chunk_rows: int | None) -> dict[str, Any]:
    """Forward, forward and backward, extra memory, and the same products alone in the op's own default chunks."""
    args, kwargs = timing.case.make(dtype, CUDA)
    inputs = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]

    def step() -> None:
        loss = linear_cross_entropy(*args, chunk_rows=chunk_rows, **kwargs).loss_sum
        torch.autograd.grad(loss, inputs)

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = milliseconds(lambda: linear_cross_entropy(*args, chunk_rows=chunk_rows, **kwargs))
    both = milliseconds(step)
    return {
        "name": timing.case.name,
        "chunk_rows": chunk_rows,
        "forward_only_ms": forward,
        "forward_backward_ms": both,
        "tflops": round(timing.flops / both / 1e9, 1),
        "extra_mib": round(extra / 2**20, 1),
        "products_ms": products(args[0].detach(), args[1].detach(), trained=args[1].requires_grad),
    }


def products(hidden: torch.Tensor, weight: torch.Tensor, trained: bool) -> float:
    """The matrix products of 2,048 rows at a time and nothing else."""
    x = hidden.new_empty(2048, len(weight))

    def run() -> None:
        for h in hidden.split(2048):
            torch.mm(h, weight.t(), out=x[: len(h)])
            torch.mm(x[: len(h)], weight)
            if trained:
                torch.mm(x[: len(h)].t(), h)

    return milliseconds(run)


def sweep(dtype: torch.dtype, rows: int = 2048, vocab: int = 128256) -> list[dict[str, Any]]:
    """The row kernel alone, with and without the gradient, fastest first."""
    x = torch.randn(rows, vocab, device=CUDA, dtype=dtype)
    labels = torch.randint(vocab, (rows,), device=CUDA)
    stats = torch.empty(3, rows, device=CUDA)
    found = []
    for block, warps, per in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16, 32), (4, 8, 16)):
        if not 4 <= block // (32 * warps) <= 16:
            continue
        launch = {"BLOCK_V": block, "NUM_WARPS": warps, "PER": per}
        for name, value in launch.items():
            setattr(cross_entropy_rows, name, value)
        times = [
            milliseconds(lambda grad=grad: cross_entropy_rows.triton_rows(x, labels, stats, 1.0, None, grad))
            for grad in (False, True)
        ]
        found.append({**launch, "statistics_ms": times[0], "with_gradient_ms": times[1]})
    return sorted(found, key=lambda row: row["with_gradient_ms"])


if __name__ == "__main__":
    main()
