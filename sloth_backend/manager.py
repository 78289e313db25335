"""The plugin manager: who is registered, in which order, and a typed way to call the hooks."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from sloth_backend import hookspecs
from sloth_backend.config import SlothConfigError
from sloth_backend.findings import Edits, Finding, Report, sign

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sloth_backend.data import Rows
    from sloth_backend.plan import MemoryPlan
    from sloth_backend.roles import Role
    from sloth_backend.run import Run
    from sloth_kernels.op import Op

BUILTIN = (
    "embedding_training",
    "optimizer_step",
    "batch_fusion",
    "kernel_patching",
    "offloaded_checkpointing",
    "chat_templates",
    "embedding_fix",  # called after tokenizer_healing, which may move the padding row
    "tokenizer_healing",
    "data_checks",
    "step_overhead",
    "layer_programs",
    "determinism",
    "allocator",
)
"""The plugins that ship with the backend, in the order in which they are registered."""

_FINDING_HOOKS = (
    *("sloth_heal_tokenizer", "sloth_fix_embeddings", "sloth_check_data"),
    *("sloth_patch_model", "sloth_patch_trainer", "sloth_patch_optimizer"),
)


class SlothPluginError(RuntimeError):
    """A plugin failed. The message names plugin and hook; the model is as it was before."""


class SlothManager:
    """A typed facade over pluggy: one method a hook."""

    def __init__(self, disabled: frozenset[str] = frozenset(), trace: bool = False) -> None:
        self.pm = pluggy.PluginManager(hookspecs.PROJECT)
        self.pm.add_hookspecs(hookspecs)
        self.disabled = disabled
        if trace:
            self.pm.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
            self.pm.enable_tracing()

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin, unless its name is disabled; its answers are signed and its failures named."""
        if name in self.disabled:
            return
        self.pm.register(_attributed_plugin(plugin, name), name)

    def load_builtins(self) -> None:
        """Register the plugins named in ``BUILTIN``."""
        for name in BUILTIN:
            self.register(importlib.import_module(f"sloth_plugins.{name}"), name)

    def load_entry_points(self) -> None:
        """Register the plugins that other distributions publish under the group ``sloth_backend``."""
        for point in importlib.import_module("importlib.metadata").entry_points(group=hookspecs.PROJECT):
            if point.name in self.disabled:
                continue
            try:
                plugin = point.load()
            except Exception as error:
                raise SlothPluginError(
                    f"plugin {point.name!r} ({point.value}) cannot be imported: {error!r}. "
                    f"Mend or uninstall it, or set SLOTH_DISABLE={point.name}."
                ) from error
            self.register(plugin, point.name)

    def names(self) -> list[str]:
        """The registered plugins in calling order: third parties first, then the built-ins."""
        return [name for name, plugin in reversed(self.pm.list_name_plugin()) if plugin is not None]

    def check(self, run: Run, model: nn.Module | None) -> list[str]:
        """Problems of all plugins, see ``sloth_check``."""
        return _flatten(self.pm.hook.sloth_check(run=run, model=model))

    def ops(self) -> dict[str, Op]:
        """Op name -> the op that won, see ``sloth_ops``."""
        found: dict[str, Op] = {}
        for op in _flatten(self.pm.hook.sloth_ops()):
            found.setdefault(op.name, op)
        return found

    def roles(self) -> list[Role]:
        """All roles in the order in which they are tried, see ``sloth_roles``."""
        return _flatten(self.pm.hook.sloth_roles())

    def heal_tokenizer(self, tokenizer: PreTrainedTokenizerBase, run: Run, edits: Edits) -> list[Finding]:
        """See ``sloth_heal_tokenizer``."""
        return _flatten(self.pm.hook.sloth_heal_tokenizer(tokenizer=tokenizer, run=run, edits=edits))

    def fix_embeddings(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run, edits: Edits
    ) -> list[Finding]:
        """See ``sloth_fix_embeddings``."""
        return _flatten(self.pm.hook.sloth_fix_embeddings(model=model, tokenizer=tokenizer, run=run, edits=edits))

    def check_data(
        self, data: Sequence[Rows], model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run
    ) -> list[Finding]:
        """See ``sloth_check_data``."""
        return _flatten(self.pm.hook.sloth_check_data(data=data, model=model, tokenizer=tokenizer, run=run))

    def memory_plan(self, model: nn.Module, run: Run) -> MemoryPlan | None:
        """See ``sloth_memory_plan``."""
        return self.pm.hook.sloth_memory_plan(model=model, run=run)

    def patch_model(
        self,
        model: nn.Module,
        run: Run,
        ops: Mapping[str, Op],
        roles: list[Role],
        plan: MemoryPlan | None,
        edits: Edits,
    ) -> list[Finding]:
        """See ``sloth_patch_model``."""
        answers = self.pm.hook.sloth_patch_model(model=model, run=run, ops=ops, roles=roles, plan=plan, edits=edits)
        return _flatten(answers)

    def patch_trainer(self, trainer: object, model: nn.Module, run: Run, edits: Edits) -> list[Finding]:
        """See ``sloth_patch_trainer``."""
        return _flatten(self.pm.hook.sloth_patch_trainer(trainer=trainer, model=model, run=run, edits=edits))

    def patch_optimizer(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, run: Run, edits: Edits
    ) -> list[Finding]:
        """See ``sloth_patch_optimizer``."""
        answers = self.pm.hook.sloth_patch_optimizer(optimizer=optimizer, model=model, run=run, edits=edits)
        return _flatten(answers)

    def report(self, run: Run, report: Report) -> None:
        """See ``sloth_report``."""
        self.pm.hook.sloth_report(run=run, report=report)


@functools.cache
def get_manager() -> SlothManager:
    """The process's manager, with built-ins and installed plugins.

    ``SLOTH_DISABLE=name,...`` keeps plugins out, ``SLOTH_TRACE=1`` prints every hook call to standard error.

    Raises:
        SlothPluginError: an installed plugin cannot be imported.
        pluggy.PluginValidationError: a plugin implements a hook, or takes an argument, that does not exist.
    """
    disabled = frozenset(filter(None, os.environ.get("SLOTH_DISABLE", "").replace(" ", "").split(",")))
    manager = SlothManager(disabled, trace=os.environ.get("SLOTH_TRACE") == "1")
    manager.load_builtins()
    manager.load_entry_points()
    manager.pm.check_pending()
    return manager


def _flatten(answers: list[list[Any] | None]) -> list[Any]:
    return [item for answer in answers if answer for item in answer]


def _attributed_plugin(plugin: object, name: str) -> object:
    """The plugin's hook functions, each of which signs its findings and names the plugin when it fails."""
    marker = f"{hookspecs.PROJECT}_impl"
    found = {key: value for key in dir(plugin) if hasattr(value := getattr(plugin, key), marker)}
    plain = {key: not (vars(f)[marker]["wrapper"] or vars(f)[marker]["hookwrapper"]) for key, f in found.items()}
    return types.SimpleNamespace(
        __name__=name, **{key: _attributed(f, name, key) if plain[key] else f for key, f in found.items()}
    )


def _attributed(function: Callable[..., Any], plugin: str, hook: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            answer = function(*args)
        except (SlothConfigError, SlothPluginError):
            raise
        except Exception as error:
            raise SlothPluginError(
                f"plugin {plugin!r} failed in {hook}: {type(error).__name__}: {error}. The model was left as it was; "
                f"SLOTH_DISABLE={plugin} runs without this plugin."
            ) from error
        return sign(answer, plugin) if hook in _FINDING_HOOKS else answer

    return call
