"""For loops of one's own: the same three phases that the hosts' switches run."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sloth_backend import phases
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Report
from sloth_backend.run import Run

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Model = TypeVar("Model", bound="nn.Module")


def optimize(
    model: Model, tokenizer: PreTrainedTokenizerBase | None = None, config: SlothConfig | dict | str | None = None
) -> Model:
    """Switch the backend on for this model instance, before its training loop starts.

    Args:
        model: a causal language model of transformers, bare or wrapped by PEFT.
        tokenizer: mended in place if given; do this before you tokenise.
        config: the options; None means all defaults.

    Returns:
        ``model`` itself; ``report(model)`` says what was changed and ``undo(model)`` takes it back.

    Raises:
        SlothConfigError: with all problems, before anything is changed.
        SlothPluginError: a plugin failed; the model is as it was.
    """
    run = Run(host="user", config=SlothConfig.parse("sloth" if config is None else config) or SlothConfig())
    session = phases.begin(run, model)
    if tokenizer is not None:
        phases.before_data(session, tokenizer)
    phases.after_load(session, model, tokenizer)
    phases.before_train(session, model)
    return model


def report(model: nn.Module) -> Report:
    """What the backend did to ``model`` and what it left alone; an empty Report where it was never switched on."""
    session = phases.find_session(model)
    return session.report() if session else Report(run="not switched on")


def undo(model: Model) -> Model:
    """Take back every change to ``model`` (and to the tokenizer mended with it); harmless where there is none."""
    phases.undo(model)
    return model
