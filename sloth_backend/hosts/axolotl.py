"""Axolotl: ``use_unsloth: true`` or ``use_sloth: true`` in the YAML, options under ``sloth:``.

``axolotl_config`` adds ``SlothPlugin`` to the plugins of a configuration that asks. Axolotl keeps its plugins for the
life of the process and calls them for every run, so each hook first looks whether its configuration asks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from sloth_backend.hosts import axolotl_config
from sloth_backend.hosts.axolotl_config import OPTIONS, Problem, is_asked, options_of
from sloth_backend.hosts.data import named

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.data import Rows
    from sloth_backend.phases import Session
    from sloth_backend.run import Run

log = logging.getLogger(__name__)

HOOKS = (
    "register",
    "get_input_args",
    "pre_lora_load",
    "post_model_load",
    "add_callbacks_post_trainer",
    "post_trainer_create",
)
TOKENIZERS, LOADER = "axolotl.loaders.tokenizer", "load_tokenizer"
DATA, HASHED = "axolotl.utils.data.shared", "DATASET_HASH_CONFIG_EXTRA_FIELDS"
LENGTHS, CUTTER = "axolotl.utils.data.utils", "handle_long_seq_in_dataset"
HEALED = "sloth_healed"
"""Key of a configuration that says how its tokenizer was mended, so that data tokenised otherwise are not reused."""

INFERENCE = "sloth_inference"
GENERATING = ("rms_norm", "rope", "glu")
"""The ops that a model has use for that does not train."""

_STATE = "_sloth_state"
_SEEN = "_sloth_seen"
_MARK = "_sloth_switch"


class SlothArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's schema."""

    use_sloth: bool | None = Field(
        default=None, json_schema_extra={"description": "Train with the optimised backend sloth_backend."}
    )
    use_unsloth: bool | None = Field(default=None, json_schema_extra={"description": "The same as use_sloth."})
    sloth: dict[str, Any] | bool | None = Field(
        default=None, json_schema_extra={"description": "Options of sloth_backend, see sloth_backend.SlothConfig."}
    )
    sloth_inference: bool | None = Field(
        default=None, json_schema_extra={"description": "Set by `axolotl inference`, where no trainer will come."}
    )

    @field_validator("sloth")
    @classmethod
    def _known_options(cls, value: dict[str, Any] | bool | None) -> dict[str, Any] | bool | None:
        options_of({OPTIONS: value})
        return value


class SlothPlugin(BasePlugin):
    """The three phases of the backend, at Axolotl's hooks."""

    def register(self, cfg: Any) -> None:
        """Refuse what cannot be combined, set what the backend needs, see to the tokenizer; nothing is loaded yet.

        Raises:
            pydantic.ValidationError: with all problems, each under its key.
            RuntimeError: this version of Axolotl lacks something that the plugin stands on.
        """
        if not is_asked(cfg):
            return
        found = axolotl_config.problems(cfg) or _problems_of_plugins(cfg)
        if found:
            raise _error(found)
        _check_hooks()
        _heal_after_loading()
        _take_the_place_of(LENGTHS, CUTTER, ["dataset", "sequence_len", "cfg"], _noting)
        _hash_what_was_healed()
        if cfg.get("inference"):  # which the schema does not keep
            cfg[INFERENCE] = True
        for said in axolotl_config.prepare(cfg):
            log.info(said)

    def get_input_args(self) -> str:
        """The keys of ours; see ``SlothArgs``."""
        return f"{__name__}.{SlothArgs.__name__}"

    def pre_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Phase B: the weights are loaded and resized, adapters come next."""
        if is_asked(cfg):
            session, tokenizer = vars(cfg).pop(_STATE, (None, None))
            vars(cfg)[_STATE] = (None, tokenizer)  # the next model, a reference, gets a session of its own
            _after_load(session, cfg, model, tokenizer)

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Phase C where the model only generates: modules run on their ops; what a training step needs is left out."""
        from sloth_backend import phases

        session = phases.find_session(model) if is_asked(cfg) and cfg.get(INFERENCE) else None
        if session is not None:
            allowed = tuple(name for name in GENERATING if session.run.config.allows(name))
            options = replace(session.run.config, kernels=allowed, checkpointing="host")
            session.run = replace(session.run, config=options)
            phases.before_train(session, model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """``axolotl evaluate`` makes a trainer and tells nobody: phase C comes with its first evaluation."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.post_trainer_create(cfg, trainer)
            return trainer.evaluate(*args, **kwargs)

        if is_asked(cfg):
            trainer.evaluate = functools.wraps(trainer.evaluate)(evaluate)
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Phase C: model, adapters and trainer are complete."""
        from sloth_backend import phases
        from sloth_backend.hosts.sharding import spread, take_over_checkpointing
        from sloth_backend.hosts.trainers import check_sharding
        from sloth_backend.optimizers import trainer_state_bytes

        if not is_asked(cfg):
            return
        vars(trainer).pop("evaluate", None)
        session = phases.find_session(trainer.model) or _after_load(None, cfg, trainer.model, trainer.processing_class)
        with phases.all_or_nothing(session):
            check_sharding(session, trainer)
            run = replace(session.run, optimizer_bytes=trainer_state_bytes(trainer))
            session.run = spread(run, trainer.accelerator)
            phases.check_data(session, trainer.model, _rows(cfg, trainer), trainer.processing_class)
            phases.before_train(session, trainer.model, trainer)
            take_over_checkpointing(trainer.accelerator, session.findings, session.edits)


def _after_load(session: Session | None, cfg: Any, model: nn.Module, tokenizer: Any) -> Session:
    from sloth_backend import phases

    session = session or phases.begin(_run(cfg))
    phases.after_load(session, model, tokenizer)
    return session


def _run(cfg: Any) -> Run:
    """The facts of a run that a validated configuration knows."""
    from sloth_backend.run import Run

    checkpointing = bool(cfg.get("gradient_checkpointing"))
    return Run("axolotl", options_of(cfg), gradient_checkpointing=checkpointing, tokens_per_pass=_tokens_per_pass(cfg))


def _rows(cfg: Any, trainer: Any) -> list[Rows]:
    """The data of a trainer, those that were seen before Axolotl cut them as they were then."""
    from sloth_backend.data import Rows

    sets = dict(named(trainer.train_dataset, trainer.eval_dataset))
    return list(({name: Rows(name, data) for name, data in sets.items()} | vars(cfg).pop(_SEEN, {})).values())


def _tokens_per_pass(cfg: Any) -> int | None:
    """Rows of a micro-batch x the length to which Axolotl cuts or packs them; None for pairs and for generated rows."""
    if cfg.get("rl") or not cfg.get("sequence_len") or not cfg.get("micro_batch_size"):
        return None
    return cfg["micro_batch_size"] * -(-cfg["sequence_len"] // 64) * 64  # its collators pad to 64


def _problems_of_plugins(cfg: Mapping[str, Any]) -> list[Problem]:
    """What the plugins of the backend find, as far as they can tell without a model."""
    from sloth_backend.manager import get_manager
    from sloth_backend.run import Run

    found = get_manager().check(Run("axolotl", options_of(cfg)), None)
    return [Problem(OPTIONS, cfg.get(OPTIONS), text) for text in found]


def _error(found: list[Problem]) -> ValidationError:
    """One error in the form in which Axolotl's schema reports its own, a line for each key."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("sloth", "{problem}", {"problem": problem.message}),
            loc=(problem.key,),
            input=problem.value,
        )
        for problem in found
    ]
    return ValidationError.from_exception_data("AxolotlInputConfig", details)


def _check_hooks() -> None:
    missing = [name for name in HOOKS if not hasattr(BasePlugin, name)]
    if missing:
        raise _moved(f"its plugins have no {', '.join(missing)}")


def _heal_after_loading() -> None:
    """Phase A: mend a tokenizer as soon as Axolotl has loaded it for a configuration that asks; twice is harmless.

    Axolotl has no hook between loading the tokenizer and tokenising, and several of its modules import the loader by
    name. The loader that takes its place hands on what it gets wherever the configuration does not ask.
    """
    _take_the_place_of(TOKENIZERS, LOADER, ["cfg"], _healing)


def _take_the_place_of(module: str, name: str, parameters: list[str], make: Callable[[Any], Any]) -> None:
    """Put what ``make`` makes of a function in its place, in all modules that have imported it; twice is harmless.

    Raises:
        RuntimeError: it does not begin with these parameters.
    """
    original = getattr(importlib.import_module(module), name, None)
    if hasattr(original, _MARK):
        return
    if original is None or list(inspect.signature(original).parameters)[: len(parameters)] != parameters:
        raise _moved(f"{module} has no {name}({', '.join(parameters)})")
    ours = make(original)
    vars(ours)[_MARK] = True
    for other in list(sys.modules.values()):
        names = getattr(other, "__dict__", {})
        if names.get(name) is original:
            names[name] = ours


def _healing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_tokenizer(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        tokenizer = original(cfg, *args, **kwargs)
        if is_asked(cfg):
            _before_data(cfg, tokenizer)
        return tokenizer

    return load_tokenizer


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take down the rows that Axolotl is about to cut or drop; with prepared data it did so in another run."""

    @functools.wraps(original)
    def handle_long_seq_in_dataset(dataset: Any, sequence_len: int, cfg: Any) -> Any:
        if is_asked(cfg):
            from sloth_backend.data import Rows

            seen = vars(cfg).setdefault(_SEEN, {})
            name = f"set {len(seen) + 1}, before it was cut" if cfg.get("test_datasets") else "train"
            longer = "keep_start" if cfg.get("excess_length_strategy") == "truncate" else "drop"
            seen[name] = Rows(name, dataset, sequence_len, longer)
        return original(dataset, sequence_len, cfg)

    return handle_long_seq_in_dataset


def _before_data(cfg: Any, tokenizer: Any) -> None:
    from sloth_backend import phases

    session = phases.begin(_run(cfg))
    phases.before_data(session, tokenizer)
    vars(cfg)[_STATE] = (session, tokenizer)  # beside the keys: they are printed and saved
    cfg[HEALED] = [f"{finding.subject}: {finding.reason}" for finding in session.report().of(action="changed")]


def _hash_what_was_healed() -> None:
    """Let ``HEALED`` count in the names of prepared data; configurations without it keep theirs."""
    module: Any = importlib.import_module(DATA)
    fields = getattr(module, HASHED, None)
    if not isinstance(fields, tuple):
        raise _moved(f"{DATA} has no {HASHED}")
    if HEALED not in fields:
        setattr(module, HASHED, (*fields, HEALED))


def _moved(what: str) -> RuntimeError:
    import axolotl

    version = getattr(axolotl, "__version__", "unknown")
    return RuntimeError(
        f"sloth_backend does not know this version of Axolotl ({version}): {what}. It was tried with 0.19 to 0.21: "
        "install one of these, or remove use_sloth, use_unsloth and sloth from the configuration"
    )
