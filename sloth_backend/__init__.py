"""sloth_backend: one switch in TRL, Axolotl or Accelerate turns on the optimised fine-tuning path.

Importing this package is light: every name below is loaded on first use, because the host switch
(``sloth_backend.autoload``) runs inside ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sloth_backend import autoload

if TYPE_CHECKING:
    from sloth_backend.api import get_chat_template, optimize, report, undo
    from sloth_backend.config import SlothConfig, SlothConfigError
    from sloth_backend.findings import Edits, Finding, Report
    from sloth_backend.hookspecs import hookimpl
    from sloth_backend.hosts.accelerate import attach
    from sloth_backend.manager import SlothPluginError
    from sloth_backend.plan import MemoryPlan
    from sloth_backend.roles import Role
    from sloth_backend.run import Run
    from sloth_kernels.op import Op

__version__ = "0.1.0"
__all__ = [
    "Edits",
    "Finding",
    "MemoryPlan",
    "Op",
    "Report",
    "Role",
    "Run",
    "SlothConfig",
    "SlothConfigError",
    "SlothPluginError",
    "attach",
    "get_chat_template",
    "hookimpl",
    "optimize",
    "report",
    "undo",
]

_HOME = {
    "attach": "sloth_backend.hosts.accelerate",
    "get_chat_template": "sloth_backend.api",
    "optimize": "sloth_backend.api",
    "report": "sloth_backend.api",
    "undo": "sloth_backend.api",
    "SlothConfig": "sloth_backend.config",
    "SlothConfigError": "sloth_backend.config",
    "Edits": "sloth_backend.findings",
    "Finding": "sloth_backend.findings",
    "Report": "sloth_backend.findings",
    "hookimpl": "sloth_backend.hookspecs",
    "SlothPluginError": "sloth_backend.manager",
    "MemoryPlan": "sloth_backend.plan",
    "Role": "sloth_backend.roles",
    "Run": "sloth_backend.run",
    "Op": "sloth_kernels.op",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'sloth_backend' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


autoload.install()
