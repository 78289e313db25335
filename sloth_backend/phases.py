"""The three phases of a run, and the only callers of hooks.

A ``before_data``: the tokenizer is mended before the host tokenises. B ``after_load``: the weights are there, their
untrained embedding rows are repaired. C ``before_train``: adapters are complete, modules, loss and checkpointing are
patched. Before C, ``check_data`` looks at what the host tokenised. A failure in any of them takes everything back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sloth_backend.config import SlothConfigError
from sloth_backend.findings import Edits, Finding, Report
from sloth_backend.manager import SlothManager, get_manager
from sloth_backend.run import Run, describe_model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sloth_backend.data import Rows

ATTRIBUTE = "_sloth_session"
"""Instance attribute of the causal language model under which its Session lives."""


@dataclass
class Session:
    """One activation of the backend: its run, what it found, and how to take it back."""

    run: Run
    manager: SlothManager = field(default_factory=get_manager, repr=False)
    findings: list[Finding] = field(default_factory=list)
    edits: Edits = field(default_factory=Edits, repr=False)

    def report(self) -> Report:
        """Everything found so far."""
        return Report(tuple(self.findings), self.run.describe())

    def __reduce__(self) -> tuple[type[Session], tuple[Run]]:
        """A copied or unpickled model keeps no way to undo: the edits belong to the original's modules."""
        return Session, (self.run,)


def begin(run: Run, model: nn.Module | None = None) -> Session:
    """Check everything that can be checked before anything is changed; an earlier session of the model is undone.

    Raises:
        SlothConfigError: with all problems of the host adapter and of all plugins.
    """
    session = Session(run)
    if model is not None:
        session.run = replace(run, **describe_model(base_model(model)))
    _raise_problems(session, model)
    if model is not None:
        undo(model)
    return session


def before_data(session: Session, tokenizer: PreTrainedTokenizerBase) -> None:
    """Phase A: mend the tokenizer in place, before the host tokenises."""
    with all_or_nothing(session):
        session.findings += session.manager.heal_tokenizer(tokenizer, session.run, session.edits)


def after_load(session: Session, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Phase B: repair the embeddings of a loaded model."""
    session.run = replace(session.run, **describe_model(base_model(model)))
    with all_or_nothing(session):
        _raise_problems(session, model)
        session.findings += session.manager.fix_embeddings(model, tokenizer, session.run, session.edits)
        _attach(session, model)


def check_data(
    session: Session, model: nn.Module, data: Sequence[Rows], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Between B and C, where the host shows its data: look at them before the first step.

    Raises:
        SlothConfigError: training on them would be meaningless.
    """
    if data:
        with all_or_nothing(session):
            session.findings += session.manager.check_data(data, base_model(model), tokenizer, session.run)


def before_train(
    session: Session,
    model: nn.Module,
    trainer: object | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Phase C: patch the model that will train, with the trainer or the optimizers that there are by then.

    The report is printed and published.
    """
    facts = describe_model(base_model(model))
    session.run = replace(session.run, **{**facts, "device": session.run.moves_to or facts["device"]})
    manager, target = session.manager, base_model(model)
    with all_or_nothing(session):
        plan = manager.memory_plan(target, session.run)
        session.findings += manager.patch_model(
            target, session.run, manager.ops(), manager.roles(), plan, session.edits
        )
        if trainer is not None:
            session.findings += manager.patch_trainer(trainer, target, session.run, session.edits)
        for optimizer in optimizers:
            session.findings += manager.patch_optimizer(optimizer, target, session.run, session.edits)
        _attach(session, model)
        report = session.report()
        manager.report(session.run, report)
    if session.run.config.print_report and _is_main_process():
        print(report, file=sys.stderr)


def with_optimizer(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What is left of phase C for an optimizer that the host gets after the model."""
    with all_or_nothing(session):
        target, edits = base_model(model), session.edits
        session.findings += session.manager.patch_optimizer(optimizer, target, session.run, edits)


@contextmanager
def all_or_nothing(session: Session) -> Iterator[None]:
    """Roll the whole session back when its block fails: nothing stays half-patched."""
    try:
        yield
    except BaseException:
        session.edits.rollback()
        session.findings.clear()
        raise


def base_model(model: Any) -> Any:
    """The causal language model inside adapter and parallel wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and not hasattr(model, "config"):
            model = model.module
        else:
            return model


def find_session(model: nn.Module) -> Session | None:
    """The session of ``model``, of the model it wraps, or of a model inside it."""
    return next((vars(m)[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in vars(m)), None)


def undo(model: nn.Module) -> None:
    """Take back everything a session did to ``model``; harmless where there is none."""
    session = find_session(model)
    if session is not None:
        session.edits.rollback()
        session.findings.clear()


def _attach(session: Session, model: nn.Module) -> None:
    target = base_model(model)
    if vars(target).get(ATTRIBUTE) is not session:
        session.edits.set(target, ATTRIBUTE, session)


def _raise_problems(session: Session, model: nn.Module | None) -> None:
    problems = [*session.run.problems, *session.manager.check(session.run, model)]
    if problems:
        raise SlothConfigError(problems)


def _is_main_process() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
