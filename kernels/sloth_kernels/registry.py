"""The ops of this package, loaded by name so that importing the package stays light."""

from __future__ import annotations

import importlib

from sloth_kernels.op import Op

OP_NAMES = ("rms_norm", "rope", "glu", "lora", "nf4", "attention", "linear_cross_entropy")


def load_ops() -> list[Op]:
    """Import ``sloth_kernels.ops.<name>`` for each of ``OP_NAMES`` and return their ``OP``."""
    return [importlib.import_module(f"sloth_kernels.ops.{name}").OP for name in OP_NAMES]
