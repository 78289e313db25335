"""Makes a host's own classes understand the switch, without an import of ours in the user's script.

PyTorch calls ``install`` at the end of ``import torch`` (entry point group ``torch.backends``), and ``import
sloth_backend`` does where ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off. ``install`` only leaves a post-import
hook for the modules in ``HOSTS``, so a process that imports none of them pays for one dictionary look-up an import.
Standard library only, and nothing raised in here reaches the user's import: ``status`` keeps it, a warning shows it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

HOSTS = {
    "axolotl.cli.config": "sloth_backend.hosts.axolotl_config:patch_config",
    "accelerate.accelerator": "sloth_backend.hosts.environment:patch_accelerator",
    "transformers.training_args": "sloth_backend.hosts.transformers:patch_config",
    "transformers.trainer": "sloth_backend.hosts.transformers:patch_trainer",
    "transformers.trainer_seq2seq": "sloth_backend.hosts.transformers:patch_trainer",
    "trl.trainer.sft_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.dpo_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.kto_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.reward_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.grpo_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.rloo_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.trainer.distillation_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.experimental.cpo.cpo_trainer": "sloth_backend.hosts.trl:patch_trainer",
    "trl.experimental.orpo.orpo_trainer": "sloth_backend.hosts.trl:patch_trainer",
}
"""Module of a host -> ``module:function`` that is called with it once it is complete, again after a reload."""

REWRITERS = ("unsloth",)
"""Libraries that write the hosts' classes anew from their signatures, and fail on a parameter that the source does not
have. They ask to be imported first: where one is, the classes stay as they are, and have no switch."""

_patched: dict[str, str] = {}
_errors: dict[str, Exception] = {}
_watched: dict[int, ModuleType] = {}


class Status(NamedTuple):
    """What became of the switches in this process.

    Attributes:
        installed: whether the post-import hook is in place.
        patched: the host modules that understand the switch by now.
        errors: host module, or ``install``, -> why its switch does not work.
    """

    installed: bool
    patched: tuple[str, ...]
    errors: dict[str, Exception]


def install() -> None:
    """Put the hook in place and serve the hosts that are imported already; twice is harmless, nothing is raised."""
    try:
        if not _is_installed():
            sys.meta_path.insert(0, HostFinder())
        for name in HOSTS:
            module = sys.modules.get(name)
            if module is None or name in _patched or id(module) in _watched:
                continue
            (_watch if _is_initializing(module) else _patch)(module)
    except Exception as error:
        _record("install", error)


def status() -> Status:
    """See ``Status``."""
    return Status(_is_installed(), tuple(_patched), dict(_errors))


class HostFinder:
    """Finds the host modules as the other finders do, with a loader that calls their patch function."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module in ``HOSTS``; None for any other, which leaves it to the next finder."""
        if fullname not in HOSTS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _PatchingLoader:
    """A module's own loader, which hands the module back to that loader and patches it after its body has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def exec_module(self, module: ModuleType) -> None:
        # inspect.getsource and importlib.reload look for the loader here
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _patch(module)


def _watch(module: ModuleType) -> None:
    """Patch ``module`` at the first access from outside after its body has run.

    The module was being imported when it imported torch itself, so that no finder of ours has seen it. Its body
    reads its globals without ``__getattribute__``; the importer that waits for it does not.
    """
    plain = type(module)

    class Watched(plain):
        def __getattribute__(self, name: str) -> Any:
            if not _is_initializing(self, plain.__getattribute__):
                self.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]
                if id(self) in _watched:
                    _patch(self)
            return plain.__getattribute__(self, name)

    _watched[id(module)] = module
    module.__class__ = Watched


def _is_initializing(module: ModuleType, get: Any = getattr) -> bool:
    """Whether the body of ``module`` is still running, as the import system itself remembers it."""
    return bool(getattr(get(module, "__spec__"), "_initializing", False))


def _is_installed() -> bool:
    return any(isinstance(finder, HostFinder) for finder in sys.meta_path)


def _patch(module: ModuleType) -> None:
    name = module.__name__
    _watched.pop(id(module), None)
    if any(library in sys.modules for library in REWRITERS):
        return
    try:
        home, _, function = HOSTS[name].partition(":")
        getattr(importlib.import_module(home), function)(module)
        _patched[name] = HOSTS[name]
        _errors.pop(name, None)
    except Exception as error:
        _record(name, error)


def _record(what: str, error: Exception) -> None:
    """Keep ``error`` for ``status`` and say once that the switch will not work; a warning must not raise either."""
    _errors[what] = error
    with contextlib.suppress(Exception):
        message = f"sloth_backend is installed, but its switch will not work here ({what}): {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
