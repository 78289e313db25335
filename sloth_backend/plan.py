"""MemoryPlan: what each layer does with the activations that its backward will need."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

LayerPlan = Literal["keep", "recompute", "offload"]


@dataclass(frozen=True)
class MemoryPlan:
    """One choice a layer, in the order in which the layers run forward.

    ``keep``: as the model does it, nothing is checkpointed by us. ``recompute``: the layer's input stays on the
    device and the layer runs again in backward. ``offload``: the same, with the input waiting in pinned host memory.
    """

    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        counts = Counter(self.layers)
        return ", ".join(f"{counts[name]} {name}" for name in ("keep", "recompute", "offload") if counts[name])
