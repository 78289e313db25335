"""``SLOTH_BACKEND``: the switch that a launcher hands to all its processes.

Nothing of ``sloth_backend`` is imported until the switch is on: this runs in every process that imports a host.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sloth_backend.config import SlothConfig

VARIABLE = "SLOTH_BACKEND"
DECLINED = "_sloth_declined"
"""Instance attribute of an Accelerator whose owner has said no, whatever the variable says."""
OFF, ON = ("", "0", "false", "no", "off"), ("1", "true", "yes", "on", "sloth")
"""What the variable may hold, in any case, beside a mapping in JSON; Accelerate's own variables take such words."""


def is_asked() -> bool:
    """Whether the variable says anything but off; what it says may still be an error."""
    # Looked up by name each time: datasets puts another object in its place when it maps in several processes.
    return os.environ.get(VARIABLE, "").strip().lower() not in OFF


def from_environment() -> SlothConfig | None:
    """The options that the variable asks for; None where it is off or not set.

    Raises:
        SlothConfigError: the value is neither a word for on or off nor a mapping of options in JSON.
    """
    if not is_asked():
        return None
    import json

    from sloth_backend.config import SlothConfig, SlothConfigError

    value = os.environ[VARIABLE].strip()
    if value.lower() in ON:
        return SlothConfig()
    try:
        options = json.loads(value)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        wanted = '1, 0, or a mapping of options in JSON such as {"checkpointing": "host"}'
        raise SlothConfigError([f"the environment variable {VARIABLE} is {value!r}: expected {wanted}"])
    return SlothConfig.from_mapping(options)


def patch_accelerator(module: ModuleType) -> None:
    """Have the adapter of Accelerate wrap ``module.Accelerator.prepare``, where the variable asks for it."""
    if is_asked():
        from sloth_backend.hosts import accelerate

        accelerate.patch_accelerator(module)
