"""What every contender must share for its losses to be comparable: the token ids, and the adapters' first weights."""

from __future__ import annotations

import math
import os
import random
import re
import zlib
from typing import Any

import torch

from integration_tests.benchmarks.training.workloads import Point, Workload

FIRST_ID, LAST_ID = 3, 100_000
"""Ids of rows, above the special tokens."""
MEAN_TOKENS = 110
"""Of a row of Alpaca's lengths."""
ADAPTER = re.compile(r"layers\.\d+\..*\.lora_([AB])\b.*weight$")


def processes() -> int:
    """How many train together, each on rows of its own."""
    return int(os.environ.get("WORLD_SIZE", 1))


def lengths(workload: Workload, point: Point, count: int) -> list[int]:
    """The lengths of ``count`` rows in tokens, the same at each call."""
    if workload.lengths == "equal":
        return [point[1]] * count
    source = random.Random(0)
    return [min(point[1], max(24, int(source.lognormvariate(4.55, 0.55)))) for _ in range(count)]


def token_rows(workload: Workload, point: Point, vocab: int) -> list[list[int]]:
    """The rows of all steps, in the order of training."""
    source = torch.Generator().manual_seed(0)
    count = row_count(workload, point)
    return [zipf_ids(source, (size,), vocab).tolist() for size in lengths(workload, point, count)]


def zipf_ids(source: torch.Generator, shape: tuple[int, ...], vocab: int) -> torch.Tensor:
    """Ids whose frequencies fall as one over their rank, as words' do (Zipf's law).

    Rows that are new in every step still share them, so that there is something to learn: a contender with wrong
    gradients falls behind. Of equally frequent ids nothing can be learned, and every loss stays where it was.
    """
    count = min(vocab, LAST_ID) - FIRST_ID
    ranks = torch.rand(shape, generator=source, dtype=torch.float64).mul_(math.log(count)).exp_()
    return ranks.to(torch.int64).clamp_(max=count) + (FIRST_ID - 1)


def tokens_per_step(workload: Workload, point: Point) -> float:
    """Tokens of a step, padding not counted, on average; packed rows count as full."""
    if workload.packing:
        return float(point[0] * workload.accumulation * point[1] * processes())
    return sum(lengths(workload, point, row_count(workload, point))) / workload.steps


def row_count(workload: Workload, point: Point) -> int:
    """Rows of all steps of all processes; where they are packed, enough to fill one step more."""
    packed = point[0] * workload.accumulation * workload.steps * processes()
    return packed if not workload.packing else (packed + point[0] * workload.accumulation) * point[1] // MEAN_TOKENS


@torch.no_grad()
def start_adapters(model: Any) -> int:
    """Set every LoRA A to values that depend on its name alone and every B to zero; returns how many were set.

    PEFT draws A from the global generator, whose state at that moment differs between contenders. The distribution is
    PEFT's: uniform within 1 / sqrt(in_features).
    """
    count = 0
    for name, parameter in model.named_parameters():
        found = ADAPTER.search(name)
        if not found:
            continue
        count += 1
        if found[1] == "B":
            parameter.zero_()
            continue
        source = torch.Generator().manual_seed(zlib.crc32(found[0].replace(".default", "").encode()))
        bound = 1 / math.sqrt(parameter.shape[1])
        parameter.copy_((torch.rand(parameter.shape, generator=source) * 2 - 1) * bound)
    return count
