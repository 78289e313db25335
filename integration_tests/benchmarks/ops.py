"""Times every op on a CUDA GPU: ours, the reference and, where it is installed, Liger's kernel of the same function.

For each of an op's ``timings()``: first the numbers (no time is reported for a function that computes something else),
then the median of CUDA-event times with the L2 cache flushed between calls, the achieved memory bandwidth as a share
of a device copy measured in the same run, or TFLOP/s where products bound the op, and the peak of extra memory. A
"host" row is the wall time of a forward and its backward on the op's first case, too small to keep the GPU busy: what
Python and the launches cost. Writes DIR/ops.json and DIR/ops.md and prints the latter; exits with 1 when our numbers
are wrong.

usage: python integration_tests/benchmarks/ops.py --out DIR [--ops rms_norm,glu]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from integration_tests import numbers  # noqa: E402
from sloth_kernels.op import Case, Op, Timing  # noqa: E402
from sloth_kernels.registry import load_ops  # noqa: E402

CUDA = torch.device("cuda:0")
DTYPE = torch.bfloat16
SAME_FUNCTION = 0.05
"""Slack of the numbers rule for Liger's figure to count: it computes the same function, not as exactly as ours must."""

Function = Callable[..., Any]


@dataclass
class Row:
    """One function on one call, in one direction. Figures are None where the numbers are wrong or nothing was run."""

    op: str
    case: str
    implementation: str
    direction: str
    microseconds: float | None = None
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    teraflops: float | None = None
    extra_mib: float | None = None
    note: str = ""


def liger_function(op: str, kwargs: dict[str, Any]) -> Function | None:
    """Liger's function with our signature, or None where it has none for these options."""
    try:
        from liger_kernel import ops as liger
    except ImportError:
        return None
    variant = kwargs.get("variant")
    if op == "rms_norm":
        mode = "llama" if variant == "cast_scale" else "gemma"
        offset = float(variant == "scale_cast_plus_one")
        return lambda x, w, eps, variant: liger.LigerRMSNormFunction.apply(x, w, eps, offset, mode, True, None)
    if op == "rope" and variant == "half":
        return lambda q, k, cos, sin, variant, unsqueeze_dim: liger.LigerRopeFunction.apply(
            q, k, cos, sin, None, unsqueeze_dim
        )
    if op == "glu" and variant in ("silu", "gelu_tanh"):
        function = liger.LigerSiLUMulFunction if variant == "silu" else liger.LigerGELUMulFunction
        return lambda gate, up, variant: function.apply(gate, up)
    if op == "linear_cross_entropy" and kwargs.get("scale", 1.0) == 1.0:
        return _liger_linear_cross_entropy
    return None


def _liger_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    **others: Any,
) -> torch.Tensor:
    from liger_kernel import ops as liger

    result = liger.LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, labels, bias, None, ignore_index, 0.0, 0.0, "sum", softcap
    )
    return result[0] if isinstance(result, tuple) else result


def implementations(op: Op, case: Case) -> Iterator[tuple[str, Function]]:
    """Ours, the reference and Liger's if there is one, by name."""
    yield "sloth", op.fn
    yield "reference", op.reference
    liger = liger_function(op.name, case.make(DTYPE, CUDA)[1])
    if liger is not None:
        yield "liger", liger


def wrong_numbers(op: Op, case: Case, name: str, fn: Function) -> str:
    """Why the function's numbers disqualify its time; empty where they do not."""

    def make() -> numbers.Call:
        return case.make(DTYPE, CUDA)

    # Fresh upstream gradients each time: Liger's kernels may write theirs in place.
    upstream = numbers.random_upstream(op.reference, make())
    try:
        ours = numbers.evaluate(fn, make(), [grad.clone() for grad in upstream])
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    stock = numbers.evaluate(op.reference, make(), upstream)
    truth = numbers.evaluate(op.reference, numbers.in_float64(make()), upstream)
    slack = op.tolerance[DTYPE] if name == "sloth" else SAME_FUNCTION
    broken = [str(error) for error in numbers.errors(ours, stock, truth, slack) if not error.holds]
    return f"computes something else: {broken[0]}" if broken else ""


def extra_memory(fn: Function, call: numbers.Call, upstream: list[torch.Tensor]) -> float:
    """Peak of memory in MiB, over what the call's tensors hold, of a forward and its backward."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    numbers.evaluate(fn, call, upstream)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def directions(fn: Function, call: numbers.Call, upstream: list[torch.Tensor], timing: Timing) -> dict[str, Function]:
    """What to time: forward and backward apart where bytes bound the op, both together where products do."""
    args, kwargs = call
    inputs = list(numbers.inputs_with_gradient(call).values())

    def forward() -> list[torch.Tensor]:
        return [output for output in numbers.as_tuple(fn(*args, **kwargs)) if output.requires_grad]

    if timing.flops:
        return {"both": lambda: torch.autograd.grad(forward(), inputs, upstream)}
    if not inputs:
        return {"forward": lambda: fn(*args, **kwargs)}
    outputs = forward()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True),
    }


def measure(op: Op, timing: Timing, name: str, fn: Function, copy_bandwidth: float) -> list[Row]:
    """The rows of one implementation on one call; a single one without figures where the numbers are wrong."""
    wrong = wrong_numbers(op, timing.case, name, fn)
    if wrong:
        return [Row(op.name, timing.case.name, name, "none", note=wrong)]
    upstream = numbers.random_upstream(op.reference, timing.case.make(DTYPE, CUDA))
    extra = extra_memory(fn, timing.case.make(DTYPE, CUDA), upstream)
    call = timing.case.make(DTYPE, CUDA)
    rows: list[Row] = []
    for direction, run in directions(fn, call, upstream, timing).items():
        seconds = median_seconds(run)
        row = Row(op.name, timing.case.name, name, direction, seconds * 1e6, extra_mib=extra)
        if direction == "both":
            row.teraflops = timing.flops / seconds / 1e12
        else:
            moved = timing.bytes_forward if direction == "forward" else timing.bytes_backward
            row.gigabytes_per_second = moved / seconds / 1e9
            row.share_of_copy = moved / seconds / copy_bandwidth
        rows.append(row)
    return rows


def measure_host(op: Op, name: str, fn: Function, calls: int = 300) -> Row:
    """Wall time a call of forward and backward where the GPU has next to nothing to do."""
    case = op.cases()[0]
    wrong = wrong_numbers(op, case, name, fn)
    if wrong:
        return Row(op.name, case.name, name, "host", note=wrong)
    args, kwargs = call = case.make(DTYPE, CUDA)
    inputs, upstream = list(numbers.inputs_with_gradient(call).values()), numbers.random_upstream(op.reference, call)

    def seconds(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            outputs = [output for output in numbers.as_tuple(fn(*args, **kwargs)) if output.requires_grad]
            if inputs:
                torch.autograd.grad(outputs, inputs, upstream)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(20)
    return Row(op.name, case.name, name, "host", seconds(calls) / calls * 1e6)


def measure_copy() -> float:
    """Bytes a second that a large device-to-device copy reads and writes."""
    source = torch.randn(2**30, device=CUDA, dtype=DTYPE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def median_seconds(run: Callable[[], Any]) -> float:
    """Median time of ``run`` on the GPU, the L2 cache flushed before each."""
    milliseconds: Any = do_bench(run, warmup=25, rep=100, return_mode="median")
    return milliseconds * 1e-3


def machine() -> dict[str, str]:
    """GPU and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"gpu": torch.cuda.get_device_name(CUDA), "cuda": str(torch.version.cuda), **versions}


def table(rows: list[Row], about: dict[str, str], copy_bandwidth: float) -> str:
    """Markdown that reads well as plain text."""
    lines = [
        "# Speed of each op",
        "",
        ", ".join(f"{name} {value}" for name, value in about.items())
        + f". Device copy: {copy_bandwidth / 1e12:.2f} TB/s. {DTYPE}, medians.",
        "",
        "| op | case | direction | implementation | us | GB/s | of copy | TFLOP/s | extra MiB | note |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        figures = (
            _figure(row.microseconds, ".0f"),
            _figure(row.gigabytes_per_second, ".0f"),
            _figure(row.share_of_copy, ".0%"),
            _figure(row.teraflops, ".0f"),
            _figure(row.extra_mib, ".1f"),
        )
        cells = (row.op, row.case, row.direction, row.implementation, *figures, row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> int:
    """Measure, write, print; 1 when an op of ours computes something else than its reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for ops.json and ops.md")
    parser.add_argument("--ops", default="", help="names separated by commas; all without it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch; the ops' speed is measured on one")
    names = set(filter(None, options.ops.split(",")))
    ops = [op for op in load_ops() if not names or op.name in names]
    if len(ops) < len(names):
        parser.error(f"unknown op in --ops; expected some of {', '.join(op.name for op in load_ops())}")
    copy_bandwidth, rows = measure_copy(), []
    for op in ops:
        rows += [measure_host(op, name, fn) for name, fn in implementations(op, op.cases()[0])]
        for timing in op.timings():
            for name, fn in implementations(op, timing.case):
                rows += measure(op, timing, name, fn, copy_bandwidth)
                torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "copy_bytes_per_second": copy_bandwidth, "rows": [asdict(row) for row in rows]}
    (options.out / "ops.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(rows, machine(), copy_bandwidth)
    (options.out / "ops.md").write_text(text)
    print(text)
    return int(any(row.note for row in rows if row.implementation == "sloth"))


if __name__ == "__main__":
    sys.exit(main())
