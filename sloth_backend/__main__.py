"""``python -m sloth_backend train.py ...``: run a script as ``python train.py ...`` would, with the backend on.

``accelerate launch -m sloth_backend train.py ...`` does so in every process. ``SLOTH_BACKEND`` may hold the options;
``SLOTH_BACKEND=0`` leaves the backend off.
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: python -m sloth_backend (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main() -> None:
    """Read what to run from ``sys.argv``, which then is as the script expects it, and run it as ``__main__``."""
    from sloth_backend.config import SlothConfigError
    from sloth_backend.hosts.environment import VARIABLE, from_environment

    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    if len(arguments) <= is_module or (not is_module and arguments[0].startswith("-")):
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    os.environ[VARIABLE] = os.environ.get(VARIABLE, "").strip() or "1"
    try:
        from_environment()
    except SlothConfigError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        _run_script(sys.argv[0])


def _run_script(path: str) -> None:
    if not os.path.exists(path):
        print(f"error: {path} does not exist\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    # python -m has put the working directory there, python train.py puts the script's
    if not sys.flags.safe_path and os.path.isfile(path):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
