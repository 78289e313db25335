"""Every hook a plugin can answer. A plugin is a module or object whose functions are marked with ``hookimpl``.

Third parties publish theirs under the entry point group ``sloth_backend``. They are registered after the
built-ins, hence called before them: they win the hooks that stop at the first result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sloth_backend.data import Rows
    from sloth_backend.findings import Edits, Finding, Report
    from sloth_backend.plan import MemoryPlan
    from sloth_backend.roles import Role
    from sloth_backend.run import Run
    from sloth_kernels.op import Op

PROJECT = "sloth_backend"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sloth_check(run: Run, model: nn.Module | None) -> list[str] | None:
    """Called before anything is changed, again once the model is loaded where the host loads it late.

    Returns:
        Problems that make the run impossible, each a sentence that names the cause and the remedy. Those of all
        plugins and of the host adapter are raised together as one SlothConfigError.
    """


@hookspec
def sloth_ops() -> list[Op] | None:
    """Called when ops are needed; of several with one name the first wins, third parties' before built-ins'."""


@hookspec
def sloth_roles() -> list[Role] | None:
    """Called when a model is about to be matched; the roles of all plugins are tried in order, third parties' first."""


@hookspec
def sloth_heal_tokenizer(tokenizer: PreTrainedTokenizerBase, run: Run, edits: Edits) -> list[Finding] | None:
    """Called in phase A, before the host tokenises: mend ``tokenizer`` in place.

    Each change is registered with ``edits`` so that it can be taken back.
    """


@hookspec
def sloth_fix_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run, edits: Edits
) -> list[Finding] | None:
    """Called in phase B, as soon as the weights are loaded: repair embedding rows in place.

    ``model`` may already carry adapters, where the user made them.
    """


@hookspec
def sloth_check_data(
    data: Sequence[Rows], model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, run: Run
) -> list[Finding] | None:
    """Called before phase C, once the host has tokenised and before the first step, where it shows its data.

    ``data`` are the sets to train and to evaluate on, one ``Rows`` each. They are looked at, never changed, and no row
    is taken from one that can only be iterated over once. Each process is called with what it has itself; a plugin that
    finds the run meaningless raises SlothConfigError.
    """


@hookspec(firstresult=True)
def sloth_memory_plan(model: nn.Module, run: Run) -> MemoryPlan | None:
    """Called once in phase C, before the model is patched: what each layer does with its activations.

    Stops at the first result that is not None. No built-in plugin answers it: None leaves the choice to those that run
    the layers. Layers that run as programs are then planned for every shape of pass from the memory that is measured;
    of the layers that run as the host's modules and that the host checkpoints, all but the last offload their input.

    Returns:
        One Level for each decoder layer, in the order in which they run. For a program, ``kept`` and ``offloaded``
        count where either is given, else the name: ``keep`` (all that backward looks at), ``recompute`` (nothing but
        the input), ``offload`` (nothing, the input in host memory). For the host's modules the name alone counts.
    """


@hookspec
def sloth_patch_model(
    model: nn.Module, run: Run, ops: Mapping[str, Op], roles: list[Role], plan: MemoryPlan | None, edits: Edits
) -> list[Finding] | None:
    """Called in phase C, when model and adapters are complete: put fast paths in place on this instance alone.

    ``model`` is the causal language model inside any adapter wrapper. Every change goes through ``edits``; classes,
    modules and parameters are left as they are. Each candidate that is not changed gets a Finding that says why.
    """


@hookspec
def sloth_patch_trainer(trainer: object, model: nn.Module, run: Run, edits: Edits) -> list[Finding] | None:
    """Called in phase C, after the model was patched, where the host is a ``transformers.Trainer``.

    ``trainer`` is complete but has not trained; its optimizer may not be there yet. Methods are replaced on this
    instance alone and taken back through ``edits``, which must not keep the trainer alive.
    """


@hookspec
def sloth_patch_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, run: Run, edits: Edits
) -> list[Finding] | None:
    """Called for each optimizer of the model that a loop of the user's own hands to its host: in phase C, or later.

    It may be wrapped, or about to be, by one that has it as ``optimizer``. A trainer's, which may not be there yet, is
    reached by ``sloth_patch_trainer``. Change this instance alone, through ``edits``, which must not keep it alive.
    """


@hookspec
def sloth_report(run: Run, report: Report) -> None:
    """Called at the end of phase C with everything that was found; for logging and tracking."""
