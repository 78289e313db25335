"""How much memory a memory plan may count on: of the device, and of the host for what waits there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sloth_backend.config import SlothConfig

if TYPE_CHECKING:
    import torch

GIB = 1 << 30

CONTEXT_BYTES = 6 * GIB // 10
"""What the driver takes for a process before its first tensor: 0.5 to 0.6 GiB on the GPUs of the last years."""

SPARE_SHARE, SPARE_MOST_BYTES = 0.05, 2 * GIB
"""What is left of the device for fragmentation and errors of the prediction: this share of it, at most this much."""

HOST_SHARE = 0.5
"""Of what the host has left, the most that is pinned: data loaders, the page cache and checkpoints need the rest."""

HOST_RESERVE_BYTES = GIB
"""Host memory that is always left to everyone else."""


@dataclass(frozen=True)
class DeviceMemory:
    """What a device says of its memory, in bytes.

    Attributes:
        total: of the device.
        free: used by no process.
        reserved: held by this process's allocator, whether tensors use it or not.
        share: of ``total``, the most that this process's allocator may hold, from 0 to 1.
    """

    total: int
    free: int
    reserved: int
    share: float = 1.0


def device_budget(
    device: torch.device | None, config: SlothConfig, measure: Callable[[torch.device], DeviceMemory] | None = None
) -> int | None:
    """Bytes that this process may allocate on ``device``; None where nothing limits it (any device but CUDA).

    It is the least of what the device can still give beside what this process has, of what PyTorch was told it may
    have (``torch.cuda.set_per_process_memory_fraction``), and of ``config.vram_budget_gb`` without the driver's own;
    from that, ``SPARE_SHARE`` is left.
    """
    if device is None or device.type != "cuda":
        return None
    memory = (measure or measure_cuda)(device)
    limits = [memory.free + memory.reserved, int(memory.total * memory.share)]
    if config.vram_budget_gb is not None:
        limits.append(int(config.vram_budget_gb * GIB) - CONTEXT_BYTES)
    limit = max(0, min(limits))
    return limit - min(int(limit * SPARE_SHARE), SPARE_MOST_BYTES)


def measure_cuda(device: torch.device) -> DeviceMemory:
    """What the CUDA runtime and PyTorch's allocator say now."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device), share)


def host_budget(available: Callable[[], int | None] | None = None) -> int:
    """Bytes of host memory that this process may pin; 0 where the machine does not say how much there is.

    The processes of a machine (``LOCAL_WORLD_SIZE``, as torchrun and accelerate set it) share what is available.
    """
    left = (available or available_bytes)() or 0
    usable = int(max(0, left - HOST_RESERVE_BYTES) * HOST_SHARE)
    return usable // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of host memory this process may still take: the machine's, or its control group's where that is less.

    Args:
        root: the file system's root (Linux); where its files say nothing, None.
    """
    known = [value for value in (_machine_bytes(root), *_control_group_bytes(root)) if value is not None]
    return min(known, default=None)


def _machine_bytes(root: Path) -> int | None:
    fields = _fields(root / "proc/meminfo")
    return fields["MemAvailable:"] * 1024 if "MemAvailable:" in fields else None


def _control_group_bytes(root: Path) -> list[int]:
    """What each enclosing group (cgroup v2, and v1's outermost) leaves; cached files count as free."""
    places = [("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):
            own = Path(line.removeprefix("0::/"))
            places += [(f"sys/fs/cgroup/{p}", "memory.max", "memory.current") for p in (own, *own.parents)]
    left = []
    for folder, limit, usage in places:
        limits, used = _text(root / folder / limit).strip(), _text(root / folder / usage).strip()
        if limits.isdigit() and used.isdigit():
            stat = _fields(root / folder / "memory.stat")
            left.append(int(limits) - int(used) + stat.get("inactive_file", 0) + stat.get("active_file", 0))
    return left


def _fields(path: Path) -> dict[str, int]:
    """``name value ...`` lines as a mapping."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
