"""Which kernel belongs to which phase of a training step, and the sums of a trace. Pure functions of profiler events.

Events are those of PyTorch's Chrome trace: kernels and copies carry ``dur`` in microseconds and the correlation id of
the call that launched them, and the call carries its thread. Autograd runs backward in a thread of its own, so a kernel
launched by the thread that launched first is forward (or the optimizer), any other is backward, and what a checkpoint
computes again counts as backward.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

Event = dict[str, Any]

PATTERNS = (
    ("memory copies", r"^Mem(cpy|set)|memcpy|memset"),
    ("dequantisation", r"dequant|nf4|4bit"),
    ("attention", r"flash|fmha|attention|attn|sdpa|efficient_attention"),
    ("rotary embedding", r"rope|rotary"),
    ("optimizer", r"adam|optimizer|multi_tensor|foreach|kOptimizer|lpnorm"),
    ("loss", r"cross_?entropy|nll_loss|log_?softmax|softmax|logsumexp"),
    ("norms", r"rms_?norm|layer_?norm|norm_kernel|_norm_"),
    ("gated activation", r"glu|silu|gelu|swish"),
    ("linear products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|splitk|split_k|sm\d\d_"),
    ("reductions", r"reduce"),
    ("copies and casts", r"copy|cast|CatArray|fill|FillFunctor|index|gather|scatter"),
    ("elementwise", r"elementwise|vectorized|triton_poi"),
)
"""Phase -> what its kernels' names contain; the first that matches wins."""
COMPILED = tuple((phase, re.compile(pattern, re.IGNORECASE)) for phase, pattern in PATTERNS)
PHASES = (*(phase for phase, _ in PATTERNS), "other")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
TOP = 25
GAPS = 12


def phase_of(kernel: str) -> str:
    """The phase that a kernel's name speaks of; ``other`` where none does."""
    return next((phase for phase, pattern in COMPILED if pattern.search(kernel)), "other")


def directions(events: Iterable[Event]) -> dict[int, str]:
    """Correlation id of each launch -> ``forward`` or ``backward``."""
    launches = [event for event in events if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})]
    if not launches:
        return {}
    first = min(launches, key=lambda event: event["ts"])["tid"]
    return {event["args"]["correlation"]: "forward" if event["tid"] == first else "backward" for event in launches}


def busy_microseconds(events: Iterable[Event]) -> float:
    """How long at least one kernel or copy was running, those on several streams counted once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def longest_gaps(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Where nothing ran for longest between the first and the last of ``events``: when, for how long, what ran before
    and what after."""
    ordered = sorted(events, key=lambda event: event["ts"])
    begin, gaps = (ordered[0]["ts"] if ordered else 0.0), list[dict[str, Any]]()
    for before, after in zip(accumulate(ordered, _later), ordered[1:], strict=False):
        end = before["ts"] + before["dur"]
        if after["ts"] > end:
            at, seconds = (end - begin) / 1e6, (after["ts"] - end) / 1e6
            gaps.append({"at": at, "seconds": seconds, "before": before["name"][:80], "after": after["name"][:80]})
    return sorted(gaps, key=lambda gap: -gap["seconds"])[:GAPS]


def _later(one: Event, other: Event) -> Event:
    """The one that ends later."""
    return other if other["ts"] + other["dur"] > one["ts"] + one["dur"] else one


def summarise(events: list[Event], span_microseconds: float) -> dict[str, Any]:
    """Sums of one step.

    Args:
        events: of the Chrome trace.
        span_microseconds: how long the step took from outside.

    Returns:
        ``phases``: phase -> seconds ``forward`` and ``backward``, ``launches``; ``step_seconds``, ``busy_seconds``,
        ``idle_share`` of the GPU, ``launches``, the ``top`` kernels by time, and the longest ``gaps`` between them.
    """
    device = [event for event in events if event.get("cat") in ON_DEVICE]
    direction = directions(events)
    phases: dict[str, dict[str, float]] = {}
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in device:
        phase = phases.setdefault(phase_of(event["name"]), {"forward": 0.0, "backward": 0.0, "launches": 0})
        phase[direction.get(event.get("args", {}).get("correlation"), "forward")] += event["dur"] / 1e6
        phase["launches"] += 1
        kernels[event["name"]][0] += event["dur"] / 1e6
        kernels[event["name"]][1] += 1
    busy = busy_microseconds(device)
    top = sorted(((seconds, count, name) for name, (seconds, count) in kernels.items()), reverse=True)[:TOP]
    return {
        "step_seconds": span_microseconds / 1e6,
        "busy_seconds": busy / 1e6,
        "idle_share": max(0.0, 1 - busy / span_microseconds),
        "launches": len(device),
        "phases": {name: phases[name] for name in PHASES if name in phases},
        "top": [{"kernel": name[:160], "seconds": seconds, "launches": count} for seconds, count, name in top],
        "gaps": longest_gaps(device),
    }


def _batches(profile: dict[str, Any]) -> str:
    if (seconds := profile.get("batch_seconds")) is None:
        return ""
    return (
        f" Making batches takes the host {seconds * 1e3:.1f} ms, {seconds / profile['step_seconds']:.1%} of the step."
    )


def table(profile: dict[str, Any]) -> str:
    """A summary in Markdown."""
    lines = [
        f"One step of {profile['step_seconds']:.3f} s: the GPU is busy for {profile['busy_seconds']:.3f} s "
        f"(idle {profile['idle_share']:.1%}) with {profile['launches']:,} kernels and copies.{_batches(profile)}",
        "",
        "| phase | forward ms | backward ms | of the step | launches |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, phase in sorted(profile["phases"].items(), key=lambda item: -item[1]["forward"] - item[1]["backward"]):
        both = phase["forward"] + phase["backward"]
        figures = f"{phase['forward'] * 1e3:.1f} | {phase['backward'] * 1e3:.1f} | {both / profile['step_seconds']:.1%}"
        lines.append(f"| {name} | {figures} | {phase['launches']:,} |")
    lines += ["", "| kernel | ms | launches |", "|---|--:|--:|"]
    for row in profile["top"]:
        name = row["kernel"].replace("|", "\\|")
        lines.append(f"| `{name}` | {row['seconds'] * 1e3:.1f} | {row['launches']:,} |")
    lines += ["", "| idle for ms | at ms | after | before |", "|--:|--:|---|---|"]
    for gap in profile["gaps"]:
        around = " | ".join(f"`{gap[side]}`".replace("|", "\\|") for side in ("before", "after"))
        lines.append(f"| {gap['seconds'] * 1e3:.2f} | {gap['at'] * 1e3:.1f} | {around} |")
    return "\n".join(lines) + "\n"
