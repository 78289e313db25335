"""What all trainers that derive from ``transformers.Trainer`` have in common: three phases around their ``__init__``.

How trainers differ is told by data, a ``Kind`` each.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sloth_backend.hosts.data import of_trainer, uncut
from sloth_backend.hosts.sharding import sharding_problems, spread, take_over_checkpointing
from sloth_backend.hosts.switch import add_keyword

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.config import SlothConfig
    from sloth_backend.findings import Finding
    from sloth_backend.phases import Session

FIGHTS = {
    "use_liger_kernel": ("kernels", "both replace the forwards of the same modules"),
    "use_kernels": ("kernels", "transformers sets its own kernels anew whenever the model turns to or from training"),
    "torch_compile": ("kernels", "torch.compile cannot trace the forwards that ours run in"),
    "activation_offloading": ("checkpointing", "both move activations, on streams that know nothing of each other"),
}
"""Option of a trainer's args or of loading the model -> the option of ours that it fights, and why."""
PEACE = {"kernels": False, "checkpointing": "host"}
"""Option of ours -> the value with which it fights nothing."""

SAME_IDS = ("tokenizer.pad_token", "tokenizer.save_pretrained")
"""What healing changes of a tokenizer without an effect on the ids of a text."""
LOSS = "linear_cross_entropy"
NEEDS = {"model", "args", "processing_class"}
"""Arguments that a trainer's ``__init__`` has to take."""


def no_seam(session: Session, model: nn.Module, args: Any) -> AbstractContextManager[None]:
    """Where the host leaves the loss to the model's own forward."""
    return nullcontext()


class Kind(NamedTuple):
    """What there is to know of a trainer.

    Attributes:
        host: ``"trl"`` or ``"transformers"``, as in Run.
        trainer: its name.
        config: ``module:name`` of the class of its ``args``.
        loader: the class of transformers that loads its tokenizer or processor where none is given; None for a
            trainer whose data come to it tokenised.
        loading: further arguments of the loader.
        rows: rows of a pass for each example of a micro-batch: 2 where examples are pairs.
        length: the option that bounds the tokens of a row; None where nothing does.
        collator_cuts: whether the collator cuts rows to that length, so that those of the data set are whole.
        reads_logits: why the model's own loss is never asked for, or what says so of a model; None where it is.
        beside: the attribute that holds a model which runs beside the trained one, where there is one.
        seam: a context around phase C that settles who computes the loss.
    """

    host: str
    trainer: str
    config: str
    loader: str | None = None
    loading: Mapping[str, Any] = {}
    rows: int = 1
    length: str | None = None
    collator_cuts: bool = False
    reads_logits: str | Callable[[nn.Module], str] | None = None
    beside: str = "ref_model"
    seam: Callable[[Session, nn.Module, Any], AbstractContextManager[None]] = no_seam

    def setting(self, args: Any, name: str) -> Any:
        """An option as the trainer will see it: that of ``args``, else the default of its class."""
        return getattr(args, name, getattr(pkgutil.resolve_name(self.config), name, None))


def switch_on(cls: Any, kind: Kind) -> None:
    """Let a trainer's class take the keyword ``backend``."""

    def construct(trainer: Any, original: Callable[..., None], call: inspect.BoundArguments, config: Any) -> None:
        _construct(kind, trainer, original, call, config)

    add_keyword(cls, NEEDS, construct)


def _construct(
    kind: Kind, trainer: Any, original: Callable[..., None], call: inspect.BoundArguments, config: SlothConfig
) -> None:
    """The trainer's own ``__init__`` with the three phases around it; a failure takes all of ours back."""
    import torch

    from sloth_backend import phases
    from sloth_backend.optimizers import trainer_state_bytes

    model = call.arguments.get("model")
    loaded = model if isinstance(model, torch.nn.Module) else None
    session = _begin(kind, loaded, call, config)
    try:
        tokenizer = _mended(session, kind, original, call, loaded)
        if loaded is not None:
            _after_load(session, kind, loaded, tokenizer)
        with uncut(trainer) as seen:
            original(*call.args, **call.kwargs)
        if loaded is None:
            _after_load(session, kind, trainer.model, tokenizer)
        check_sharding(session, trainer)
        phases.check_data(session, trainer.model, of_trainer(trainer, kind, seen), tokenizer)
        run = replace(session.run, optimizer_bytes=trainer_state_bytes(trainer))
        session.run = spread(run, trainer.accelerator)
        if _narrow(session, kind, trainer):
            with kind.seam(session, phases.base_model(trainer.model), trainer.args):
                phases.before_train(session, trainer.model, trainer)
            take_over_checkpointing(trainer.accelerator, session.findings, session.edits)
            _patch_reference(session, kind, trainer, tokenizer)
    except BaseException:
        session.edits.rollback()
        raise


def _begin(kind: Kind, loaded: Any, call: inspect.BoundArguments, config: SlothConfig) -> Session:
    """The session of a run that can work.

    Raises:
        SlothConfigError: it cannot; all reasons.
    """
    from sloth_backend import phases
    from sloth_backend.run import Run

    args = call.arguments.get("args")
    run = Run(
        kind.host,
        config,
        gradient_checkpointing=bool(kind.setting(args, "gradient_checkpointing")),
        tokens_per_pass=_tokens_per_pass(kind, args),
        problems=tuple(_problems(kind, call.arguments, config)),
    )
    fits = loaded is not None and _is_causal_lm(loaded)
    session = phases.begin(run, loaded if fits else None)
    if loaded is not None and not fits:
        phases.undo(loaded)
    return session


def check_sharding(session: Session, trainer: Any) -> None:
    """What is known of it once the trainer has its accelerator.

    Raises:
        SlothConfigError: the run cannot work as it is spread; all reasons.
    """
    from sloth_backend.config import SlothConfigError

    if problems := sharding_problems(trainer.accelerator, session.run.config, trainer.model):
        raise SlothConfigError(problems)


def _narrow(session: Session, kind: Kind, trainer: Any) -> bool:
    """Leave out what is for other losses and models, each with a Finding; whether anything is left.

    Passing rows together and the fused loss take labels for next tokens, which they are in causal language models.
    """
    from sloth_backend import phases
    from sloth_backend.findings import Finding
    from sloth_kernels.registry import OP_NAMES

    base, config = phases.base_model(trainer.model), session.run.config
    left_out = []
    if kind.reads_logits and config.allows(LOSS):
        config = replace(config, kernels=tuple(name for name in OP_NAMES if config.allows(name) and name != LOSS))
        why = kind.reads_logits(base) if callable(kind.reads_logits) else kind.reads_logits
        left_out.append(("loss", f"{kind.trainer} {why}", LOSS))
    # Trainer asks the same of a model, to count the labels of a step.
    shifts = _is_causal_lm(base) and (kind.loader is not None or getattr(trainer, "_loss_shifts_labels", True))
    if not shifts and not kind.reads_logits and config.accumulation != "host":
        config = replace(config, accumulation="host")
        reason = f"the labels of a {type(base).__name__} may not be next tokens"
        left_out.append(("micro-batches", reason, "batch_fusion"))
    known = hasattr(base, "get_output_embeddings")
    if not known:
        left_out.append(("model", f"{type(base).__name__} is no model of transformers: nothing is changed", "model"))
        session.edits.set(base, phases.ATTRIBUTE, session)
    session.run = replace(session.run, config=config)
    session.findings += [Finding("skipped", what, why, capability, kind.host) for what, why, capability in left_out]
    return known


def _problems(kind: Kind, given: Mapping[str, Any], config: SlothConfig) -> list[str]:
    """What was given to the trainer that cannot be combined with ``config``."""
    args, model = given.get("args"), given.get("model")
    asked = {name for name in FIGHTS if kind.setting(args, name)}
    if getattr(model, "use_kernels", False) or (kind.setting(args, "model_init_kwargs") or {}).get("use_kernels"):
        asked.add("use_kernels")
    problems = [
        f"{name}=True cannot be combined with {ours}={getattr(config, ours)!r} of backend='sloth': {why}. "
        f"Set {name}=False, or {ours}={PEACE[ours]!r} among the options of the backend."
        for name, (ours, why) in FIGHTS.items()
        if name in asked and getattr(config, ours) not in (PEACE[ours], ())
    ]
    if given.get("model_init") is not None:
        problems.append(
            "model_init makes another model in every train(), which would train without backend='sloth': give the "
            "trainer a model, or call sloth_backend.optimize(model) in model_init and leave the switch out."
        )
    return problems


def _tokens_per_pass(kind: Kind, args: Any) -> int | None:
    """Rows of a micro-batch x the length to which the trainer truncates or packs; None where it does neither."""
    length = kind.setting(args, kind.length) if kind.length else None
    multiple = kind.setting(args, "pad_to_multiple_of") or 1
    multiple = multiple if isinstance(multiple, int) else 1  # "auto" pads on other devices than GPUs
    if length is None or (kind.setting(args, "dataset_kwargs") or {}).get("skip_prepare_dataset"):
        return None
    return kind.rows * kind.setting(args, "per_device_train_batch_size") * -(-length // multiple) * multiple


def _mended(
    session: Session, kind: Kind, original: Callable[..., None], call: inspect.BoundArguments, loaded: Any
) -> Any:
    """Phase A on the tokenizer that the trainer will use; returns it."""
    from transformers import ProcessorMixin

    from sloth_backend import phases

    given = call.arguments
    if kind.loader is not None and given.get("processing_class") is None:
        given["processing_class"] = _load_processor(kind, original, given.get("model"), given.get("args"))
    processor = given.get("processing_class")
    tokenizer: Any = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if kind.loader is None and (tokenizer is None or not _is_causal_lm(loaded)):
        return None  # what healing knows of end and padding is about texts that are continued
    phases.before_data(session, tokenizer)
    if kind.loader is None:
        session.findings += _tokenised_before(session, kind)
    return tokenizer


def _tokenised_before(session: Session, kind: Kind) -> list[Finding]:
    """Where a mend changes how texts are encoded: rows that come to the trainer tokenised are as they were."""
    from sloth_backend.findings import Finding

    mended = [f.subject for f in session.findings if f.action == "changed" and f.subject not in SAME_IDS]
    if not mended:
        return []
    reason = (
        f"{', '.join(mended)} changed after the rows were tokenised, which stay as they are: tokenise them with a copy "
        "that `sloth heal MODEL_DIR --write OUT` mended"
    )
    return [Finding("warned", "train_dataset", reason, "tokenizer_healing", kind.host)]


def _load_processor(kind: Kind, original: Callable[..., None], model: Any, args: Any) -> Any:
    """The tokenizer or processor as the trainer would load it, so that it is mended before it is used."""
    import transformers
    from trl.trainer.utils import get_config_model_id

    name, revision = model, None
    if not isinstance(model, str):
        name = get_config_model_id(model.config)
    elif "model_revision" in inspect.unwrap(original).__code__.co_varnames:  # TRL 1.9 takes the default revision's
        revision = (kind.setting(args, "model_init_kwargs") or {}).get("revision")
    trust = kind.setting(args, "trust_remote_code")
    loader = getattr(transformers, kind.loader or "AutoProcessor")
    return loader.from_pretrained(name, revision=revision, trust_remote_code=trust, **kind.loading)


def _after_load(session: Session, kind: Kind, model: Any, tokenizer: Any) -> None:
    """Phase B, which is for causal language models; others get a Finding."""
    from sloth_backend import phases
    from sloth_backend.findings import Finding

    if _is_causal_lm(model):
        phases.after_load(session, model, tokenizer)
    elif session.run.config.fix_embeddings:
        name = type(phases.base_model(model)).__name__
        reason = f"the model is a {name}, which is no causal language model: its embeddings are left as they are"
        session.findings.append(Finding("skipped", "embeddings", reason, "embedding_fix", kind.host))


def _is_causal_lm(model: Any) -> bool:
    from sloth_backend.phases import base_model
    from sloth_backend.run import is_causal_lm

    return is_causal_lm(base_model(model))


def _patch_reference(session: Session, kind: Kind, trainer: Any, tokenizer: Any) -> None:
    """Let a model beside the trained one run as that does, so that both round alike; undone with it."""
    from sloth_backend import phases
    from sloth_backend.findings import Finding

    reference = getattr(trainer, kind.beside, None)
    if reference is None:
        return
    if str(getattr(trainer.accelerator.distributed_type, "value", "")) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        reason = f"it is sharded ({trainer.accelerator.distributed_type}) and left as the host made it"
        session.findings.append(Finding("skipped", kind.beside, reason, "reference_model", kind.host))
        return
    quiet = replace(session.run.config, print_report=False)
    own = phases.begin(replace(session.run, config=quiet, gradient_checkpointing=False), reference)
    # The trained model remembers its edits; it must not keep the reference alive.
    session.edits.on_undo(functools.partial(_undo, weakref.ref(reference)))
    phases.after_load(own, reference, tokenizer)
    phases.before_train(own, reference)
    reason = f"runs on the same kernels as the trained one; sloth_backend.report(trainer.{kind.beside})"
    session.findings.append(Finding("changed", kind.beside, reason, "reference_model", kind.host))


def _undo(reference: weakref.ref[nn.Module]) -> None:
    from sloth_backend import phases

    model = reference()
    if model is not None:
        phases.undo(model)
