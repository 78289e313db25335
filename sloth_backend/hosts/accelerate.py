"""Accelerate: ``SLOTH_BACKEND=1``, ``accelerate launch -m sloth_backend`` and ``sloth_backend.attach(accelerator)``.

Where the environment switches the backend on, ``hosts.environment`` calls ``patch_accelerator`` with Accelerate's
module once it is imported, and ``Accelerator.prepare`` is wrapped in place: it hands causal language models to the
three phases before Accelerate puts autocast, DDP, FSDP or DeepSpeed around them. ``attach`` wraps one instance's alone.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sloth_backend.hosts.accelerate_facts import (
    keep_autocast,
    optimizer_bytes,
    optimizers_of,
    place,
    problems,
    split_embeddings,
    uncompiled,
)
from sloth_backend.hosts.data import of_loaders
from sloth_backend.hosts.environment import DECLINED, from_environment
from sloth_backend.hosts.sharding import spread, take_over_checkpointing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sloth_backend.config import SlothConfig
    from sloth_backend.phases import Session
    from sloth_backend.run import Run

LOOPS = ("accelerate", "user")
"""Hosts, as in Run, whose optimizers come to ``prepare`` from a loop of the user's own."""
_MARK = "_sloth_prepare"


def patch_accelerator(module: ModuleType) -> None:
    """Let ``module.Accelerator.prepare`` do what the environment asks for by then, in place; twice is harmless.

    A value that is not understood is kept for ``prepare`` to raise: an import must not fail.

    Raises:
        RuntimeError: ``prepare`` has not the signature that this adapter knows.
    """
    cls = module.Accelerator
    if not hasattr(cls.prepare, _MARK):
        cls.prepare = _wrapped(_checked(cls.prepare), _asked_by_environment)


def _asked_by_environment() -> _Request | None:
    config = from_environment()
    return _Request(config) if config else None


def attach(
    accelerator: Any, tokenizer: PreTrainedTokenizerBase | None = None, config: SlothConfig | dict | str | None = None
) -> Any:
    """Switch the backend on for the models that this Accelerator will prepare.

    Args:
        accelerator: an ``accelerate.Accelerator`` that has prepared no causal language model yet.
        tokenizer: mended in place, now, if given; do this before you tokenise.
        config: the options; None means all defaults.

    Returns:
        ``accelerator`` itself. After ``accelerator.prepare(model, ...)``, ``report(model)`` says what was changed.
        A second call replaces the options of the first, for models that are not prepared yet.

    Raises:
        SlothConfigError: with all problems, before anything is changed.
        TypeError: ``accelerator`` is something else.
    """
    from accelerate import Accelerator

    from sloth_backend import phases
    from sloth_backend.config import SlothConfig, SlothConfigError
    from sloth_backend.run import Run

    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"attach() takes an accelerate.Accelerator, got {type(accelerator).__name__}")
    if any(map(_needs_session, accelerator._models)):
        raise SlothConfigError(["a model is prepared already: call attach(accelerator) before accelerator.prepare"])
    options = SlothConfig.parse("sloth" if config is None else config) or SlothConfig()
    session = phases.begin(Run("accelerate", options, problems=tuple(problems(accelerator, options))))
    if tokenizer is not None:
        phases.before_data(session, tokenizer)
    request = _Request(options, tokenizer, session)
    prepare = _wrapped(_checked(type(accelerator).prepare), lambda: request)
    accelerator.prepare = types.MethodType(prepare, accelerator)
    return accelerator


class _Request:
    """What was asked for: options, and a tokenizer with the session that has mended it."""

    def __init__(self, config: SlothConfig, tokenizer: Any = None, session: Session | None = None) -> None:
        self.config, self.tokenizer, self._session = config, tokenizer, session
        self._mended = list(session.findings) if session is not None else []

    def begin(self, run: Run, model: nn.Module) -> Session:
        """A session for ``model``: the one that has mended the tokenizer the first time, then others that say so."""
        from sloth_backend import phases

        session, self._session = self._session, None
        if session is None:
            session = phases.begin(run, model)
            session.findings += self._mended
        session.run = run
        return session


def _checked(prepare: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(prepare).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds or "device_placement" not in parameters:
        raise RuntimeError(f"the signature of Accelerator.prepare is not one that this adapter knows: {parameters}")
    return prepare


def _wrapped(original: Callable[..., Any], ask: Callable[[], _Request | None]) -> Callable[..., Any]:
    """``prepare`` that activates first. A failure, ours or Accelerate's, takes back what this call has activated."""

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        request = None if hasattr(self, DECLINED) else ask()
        with _all_or_nothing() as sessions:
            for model, placement in _placed(args, device_placement):
                if request is not None and _needs_session(model):
                    sessions.append(_activate(self, model, placement, request, args))
            prepared = original(self, *args, device_placement=device_placement)
        if request is not None:
            _serve_late(self, sessions, prepared if isinstance(prepared, tuple) else (prepared,))
        return prepared

    vars(prepare)[_MARK] = True
    return prepare


def _serve_late(accelerator: Any, done: Sequence[Session], prepared: Sequence[Any]) -> None:
    """The optimizers among what was just prepared whose model was switched on before; trainers see to theirs."""
    from sloth_backend import phases

    for model in accelerator._models:
        session = phases.find_session(model)
        if session is None or any(session is one for one in done) or session.run.host not in LOOPS:
            continue
        for optimizer in optimizers_of(model, prepared):
            phases.with_optimizer(session, model, optimizer)


@contextmanager
def _all_or_nothing() -> Iterator[list[Session]]:
    sessions: list[Session] = []
    try:
        yield sessions
    except BaseException:
        for session in reversed(sessions):
            session.edits.rollback()
        raise


def _placed(args: tuple[Any, ...], placement: Sequence[bool | None] | None) -> Iterator[tuple[Any, bool | None]]:
    """Each argument with what the caller said of its placement; a list of another length is Accelerate's to refuse."""
    places = [None] * len(args) if placement is None or len(placement) != len(args) else placement
    yield from zip(args, places, strict=True)


def _needs_session(model: Any) -> bool:
    """Whether it is a causal language model of transformers, bare or wrapped, that the backend is not on for."""
    import torch

    from sloth_backend import phases

    if not isinstance(model, torch.nn.Module):
        return False
    target = phases.base_model(uncompiled(model))
    return _is_causal_lm(target) and phases.find_session(target) is None


def _is_causal_lm(model: Any) -> bool:
    from transformers import PreTrainedModel

    from sloth_backend.run import is_causal_lm

    return isinstance(model, PreTrainedModel) and is_causal_lm(model)


def _activate(
    accelerator: Any, model: nn.Module, placement: bool | None, request: _Request, args: tuple[Any, ...]
) -> Session:
    """The three phases for one of the arguments of ``prepare``."""
    from sloth_backend import phases
    from sloth_backend.run import Run

    found = tuple(problems(accelerator, request.config, model))
    model = uncompiled(model)
    run = Run("accelerate", request.config, optimizer_bytes=optimizer_bytes(model, args), problems=found)
    run = spread(run, accelerator)
    session = request.begin(run, model)
    place(accelerator, model, placement)
    keep_autocast(accelerator, phases.base_model(model), session.edits)
    phases.after_load(session, model, request.tokenizer)
    phases.check_data(session, model, of_loaders((*accelerator._dataloaders, *args)), request.tokenizer)
    split_embeddings(session, model, (*accelerator._optimizers, *accelerator._schedulers, *args))
    phases.before_train(session, model, optimizers=optimizers_of(model, args))
    take_over_checkpointing(accelerator, session.findings, session.edits)
    return session
