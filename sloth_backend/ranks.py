"""What the processes of a run decide together. Every one of them must come to each of these calls, in one order.

The numbers travel through host memory, so that nobody waits for a device: through the run's own process group where
that reaches the host (gloo), else through one of gloo that is made at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


def several() -> bool:
    """Whether there is anybody to decide with."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest(values: Sequence[float]) -> list[float]:
    """Each value as the largest of all processes, which give equally many."""
    import torch
    import torch.distributed as dist

    if not several():
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_on_hosts(dist.group.WORLD))
    return found.tolist()


def least(value: int | None) -> int | None:
    """The least of all processes' values, below 2**53; None, which nobody is asked about, where there is no limit."""
    return None if value is None else int(-largest([-float(value)])[0])


def everywhere(here: bool) -> bool:
    """Whether it is so in all processes."""
    return not any(largest([float(not here)]))


@functools.lru_cache(maxsize=1)
def _on_hosts(world: Any) -> Any:
    """A group of all processes whose tensors are in host memory."""
    import torch.distributed as dist

    return world if "gloo" in str(dist.get_backend_config(world)) else dist.new_group(backend="gloo")
