"""What a pass through a model may cost, in bytes and seconds: plain data, and the peak that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import add


@dataclass(frozen=True)
class Level:
    """One way to run a layer: what is neither kept nor offloaded is computed again in backward.

    Attributes:
        name: what it keeps, in words: ``"keep"``, ``"keep without norms"``, ``"recompute"``, ``"offload"``...
        kept: the values that stay on the device between forward and backward.
        offloaded: the values that wait in pinned host memory.
        device_bytes: bytes held on the device between the layer's forward and backward, less what only comes into being
            with its backward though it is counted as fixed.
        host_bytes: bytes of pinned host memory held in that time.
        seconds: time it takes beyond the layer's fastest level, forward and backward together.
        working_bytes: further bytes on the device while the layer's backward runs: recomputed values, gradients, and
            offloaded values at home again or on their way, those of the layer below included.
        tile_rows: tokens that the layer's MLP runs on at a time; 0 for all.
    """

    name: str
    kept: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    device_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    working_bytes: int = 0
    tile_rows: int = 0


@dataclass(frozen=True)
class Cached:
    """Dense copies of quantised weights that may stay on the device, for all layers in the order in which they run.

    Attributes:
        bytes_per_layer: bytes of each layer's copies.
        seconds_per_layer: time that they save each pass.
    """

    bytes_per_layer: tuple[int, ...]
    seconds_per_layer: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """What a pass of ``tokens`` costs.

    Attributes:
        tokens: rows x length of the pass.
        layers: for each layer, in the order in which they run, its levels, the fastest first; layers that are alike
            share one tuple. Each layer has a level without host bytes.
        fixed_bytes: weights, adapters, gradients and optimizer state.
        head_bytes: transient peak of head, loss and embedding at the end of forward, beside the layers' kept values.
        forward_bytes: transient peak of one layer's forward, beside the layers' kept values, its own included.
        cached: the dense copies that may be held; None where there is nothing to hold.

    Raises:
        ValueError: a layer has no level without host bytes, or ``cached`` is not one entry a layer.
    """

    tokens: int
    layers: tuple[tuple[Level, ...], ...]
    fixed_bytes: int
    head_bytes: int
    forward_bytes: int
    cached: Cached | None = None

    def __post_init__(self) -> None:
        for levels in {id(levels): levels for levels in self.layers}.values():
            if not any(level.host_bytes == 0 for level in levels):
                names = ", ".join(repr(level.name) for level in levels) or "none"
                raise ValueError(f"a layer needs a level without host bytes, its levels are: {names}")
        if self.cached and not (
            len(self.cached.bytes_per_layer) == len(self.cached.seconds_per_layer) == len(self.layers)
        ):
            raise ValueError(
                f"dense weights of {len(self.layers)} layers expected, got {len(self.cached.bytes_per_layer)} "
                f"bytes and {len(self.cached.seconds_per_layer)} seconds"
            )

    def layers_peak(self, levels: Sequence[Level]) -> int:
        """The peak at ``levels`` without fixed bytes and dense weights.

        It is at the end of forward, when all layers hold what they keep, or in the backward of some layer, when those
        above it have let go of it.
        """
        held = list(accumulate((level.device_bytes for level in levels), initial=0))
        backward = map(add, held[1:], [level.working_bytes for level in levels])
        return max(chain([held[-1] + self.end_bytes], backward))

    @property
    def end_bytes(self) -> int:
        """What is needed beside all kept values when the last layer's forward or the head runs."""
        return max(self.head_bytes, self.forward_bytes)


def peak_bytes(levels: Sequence[Level], cached: int, costs: Costs) -> int:
    """The most that is allocated at one time when the layers run at ``levels``, the first ``cached`` on dense weights.

    Raises:
        ValueError: there is not one level a layer.
    """
    if len(levels) != len(costs.layers):
        raise ValueError(f"{len(costs.layers)} levels expected, one a layer, got {len(levels)}")
    weights = sum(costs.cached.bytes_per_layer[:cached]) if costs.cached else 0
    return costs.fixed_bytes + weights + costs.layers_peak(levels)
