"""Attention's speed by kernel, shape and mask, beside what scaled_dot_product_attention chooses by itself.

Writes one JSON object: for each workload and length the TFLOP/s forward and backward of every backend that takes it,
counting the scores that are seen, and the backends by total time, the fastest first, which is the order that
``PREFERENCE`` in ``ops/attention.py`` should have. "default" is SDPA as transformers calls it. Needs a CUDA GPU.

usage: python integration_tests/benchmarks/attention.py [--out attention.json] [--lengths 512,2048] [--only causal]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sloth_kernels.attention_backends import repeated
from sloth_kernels.attention_inputs import Inputs, band
from sloth_kernels.cases.attention import make_call
from sloth_kernels.ops import attention as op
from sloth_kernels.ops.attention import BACKENDS, AttentionSpec

CUDA = torch.device("cuda:0")
MASK_LENGTH = 8192
"""Longest row for which a mask is written out, (B, S, S)."""


@dataclass(frozen=True)
class Workload:
    """A model's attention: heads of queries and keys, their width, and what is seen."""

    heads: tuple[int, int]
    width: int
    mask: str = "none"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


WORKLOADS = {
    "causal": Workload((32, 8), 128),  # Llama 3 8B
    "causal_narrow": Workload((32, 8), 64),  # Llama 3.2 1B
    "causal_wide": Workload((16, 8), 256),  # Gemma 3
    "padded": Workload((32, 8), 128, "bool-right"),
    "window": Workload((32, 8), 128, window=4096),  # Mistral 7B v0.1
    "softcap_window": Workload((16, 8), 256, window=4096, softcap=50.0),  # Gemma 2 9B
    "sinks": Workload((64, 8), 64, sinks=True),  # gpt-oss
    "sinks_window": Workload((64, 8), 64, window=128, sinks=True),
}


def main() -> None:
    """Measure each workload at each length and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="512,2048,8192,32768,65536")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a pass, for rows shorter than that")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--without", default="", help="backends to leave out, separated by commas")
    options = parser.parse_args()
    rows = [
        measure(name, int(length), options.tokens, options.without.split(","))
        for name in options.only.split(",")
        for length in options.lengths.split(",")
        if WORKLOADS[name].mask == "none" or int(length) <= MASK_LENGTH
    ]
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    text = json.dumps({"device": torch.cuda.get_device_name(), **versions, "rows": rows}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(name: str, length: int, tokens: int, without: list[str]) -> dict[str, Any]:
    """One workload at one length: {"forward", "backward"} in TFLOP/s by backend, or why it has none."""
    work, batch = WORKLOADS[name], max(1, tokens // length)
    spec = AttentionSpec(work.width**-0.5, work.softcap, window=work.window)
    args, _ = make_call(
        torch.bfloat16, CUDA, spec, batch, length, work.heads, (work.width, work.width), work.mask, work.sinks
    )
    x = op.inputs_of(*args, spec)
    reach = min(work.window or length, length)
    flops = 4 * batch * work.heads[0] * work.width * (length * reach - reach * (reach - 1) // 2)
    results: dict[str, Any] = {}
    for backend in (*BACKENDS, "default"):
        if backend not in without:
            results[backend] = attempt(backend, x, flops)
        torch.cuda.empty_cache()
    timed = {backend: found for backend, found in results.items() if "total_ms" in found}
    order = sorted(timed, key=lambda backend: timed[backend]["total_ms"])
    chosen = op.choose(*args[:4], spec, args[4]).name
    return {"workload": name, "batch": batch, "length": length, "chosen": chosen, "order": order, "backends": results}


def attempt(name: str, x: Inputs, flops: int) -> dict[str, Any]:
    """Speeds of a backend, or the reason why it was not timed."""
    longest = {"eager": MASK_LENGTH // 2, "default": MASK_LENGTH if x.form == "window" else x.q.shape[2]}
    if x.q.shape[2] > longest.get(name, x.q.shape[2]):
        return {"skipped": "scores or a mask would be written out"}
    if name == "default" and (x.spec.softcap or x.sinks is not None):
        return {"skipped": "SDPA has neither softcap nor sinks"}
    if name != "default" and (what := op.refusal(BACKENDS[name], x)):
        return {"skipped": what}
    try:
        return speeds(*(steps_of_default(x) if name == "default" else steps_of(name, x)), flops)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"failed": str(error).splitlines()[0]}


def steps_of(name: str, x: Inputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward, and a forward with its backward."""
    backend, dout = BACKENDS[name], torch.randn_like(x.q)

    def both() -> None:
        out, extras = op.run(backend, x)
        op.run_backward(backend, dout, x, out, extras)

    return lambda: op.run(backend, x), both


def steps_of_default(x: Inputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of SDPA, with key heads repeated where transformers repeats them."""
    mask = band(x.q, x.k, x.spec) if x.form == "window" else x.mask
    dout = torch.randn_like(x.q)

    def forward() -> torch.Tensor:
        heads = x.k.shape[1] if mask is None else x.q.shape[1]
        k, v = repeated(x.k, heads), repeated(x.v, heads)
        grouped = k.shape[1] != x.q.shape[1]
        return F.scaled_dot_product_attention(
            x.q, k, v, mask, is_causal=mask is None, scale=x.spec.scale, enable_gqa=grouped
        )

    return forward, lambda: torch.autograd.grad(forward(), [x.q, x.k, x.v], dout)


def speeds(forward: Callable[[], Any], both: Callable[[], Any], flops: int) -> dict[str, Any]:
    """Milliseconds, and TFLOP/s of the forward and of the backward, which has two and a half times its products."""
    with torch.no_grad():
        forward_ms = milliseconds(forward)
    total_ms = milliseconds(both)
    backward_ms = max(total_ms - forward_ms, 1e-3)
    return {
        "forward": round(flops / forward_ms / 1e9, 1),
        "backward": round(2.5 * flops / backward_ms / 1e9, 1),
        "forward_ms": round(forward_ms, 4),
        "total_ms": round(total_ms, 4),
    }


def milliseconds(run: Callable[[], Any], repeats: int = 12) -> float:
    """Median of ``repeats`` runs after three to warm up, with the second-level cache overwritten in between."""
    cache = torch.empty(2**28, dtype=torch.int8, device=CUDA)
    times = []
    for _ in range(repeats + 3):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
