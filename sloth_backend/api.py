"""For loops of one's own: the same three phases that the hosts' switches run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from sloth_backend import phases
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Report
from sloth_backend.run import Run

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Model = TypeVar("Model", bound="nn.Module")
Tokenizer = TypeVar("Tokenizer", bound="PreTrainedTokenizerBase")


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
    options = SlothConfig.parse("sloth" if config is None else config) or SlothConfig()
    run = Run(host="user", config=options, problems=tuple(_problems(options)))
    session = phases.begin(run, model)
    if tokenizer is not None:
        phases.before_data(session, tokenizer)
    phases.after_load(session, model, tokenizer)
    phases.before_train(session, model)
    return model


def _problems(options: SlothConfig) -> list[str]:
    if options.embedding_learning_rate is None:
        return []
    return [
        "embedding_learning_rate is set, and optimize() sees no optimizer: give yours a group with that rate for what "
        "trains of the embeddings (sloth_backend.embedding_rate.split_groups does it), and leave the option out here"
    ]


def report(model: nn.Module) -> Report:
    """What the backend did to ``model`` and what it left alone; an empty Report where it was never switched on."""
    session = phases.find_session(model)
    return session.report() if session else Report(run="not switched on")


def undo(model: Model) -> Model:
    """Take back every change to ``model`` (and to the tokenizer mended with it); harmless where there is none."""
    phases.undo(model)
    return model


def get_chat_template(
    tokenizer: Tokenizer,
    name: str,
    mapping: Mapping[str, str] | None = None,
    map_eos: bool = False,
    model: nn.Module | None = None,
) -> Tokenizer:
    """Give a tokenizer a chat format: its template, and one id for each of its tokens.

    Tokens that the vocabulary lacks take the place of reserved ones, and are added only where none is left. Assistant
    masks (``return_assistant_tokens_mask``, TRL's ``assistant_only_loss``) cover what the assistant says and the token
    that ends its turn, nothing else. Call it before you tokenise and before you add adapters.

    Args:
        tokenizer: changed in place.
        name: ``chatml``, ``llama-3``, ``llama-3.1``, ``mistral`` (v3), ``mistral-v1``, ``mistral-v3-tekken``,
            ``mistral-v7``, ``gemma-2``, ``gemma-3``, ``qwen-2.5``, ``phi-3``, ``zephyr``, ``vicuna`` or ``alpaca``.
        mapping: what the rows call ``role`` and ``content``, and the roles: ``{"role": "from", "content": "value",
            "user": "human", "assistant": "gpt"}`` for ShareGPT. Rows with the usual names are read too.
        map_eos: make the token that ends a turn eos; where the vocabulary lacks it, it takes eos's id, whose row is
            trained to end texts.
        model: gets rows for added tokens, set to the mean of the trained rows, and stops generating at the turn's end.

    Returns:
        ``tokenizer`` itself. The report of a run that uses it says what was done.

    Raises:
        SlothConfigError: unknown name, wrong mapping, or a tokenizer or model that cannot be changed; nothing was.
    """
    chat_templates = importlib.import_module("sloth_plugins.chat_templates")
    return chat_templates.get_chat_template(tokenizer, name, mapping, map_eos, model)
