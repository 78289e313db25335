"""TRL: ``SFTTrainer(..., backend="sloth")``, ``SFTConfig(backend="sloth")`` and ``trl sft --backend sloth``.

``autoload`` calls ``patch_config`` and ``patch_trainer`` with TRL's modules once they are imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sloth_backend.hosts.switch import add_field, add_keyword

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.config import SlothConfig
    from sloth_backend.phases import Session

FIGHTS = {
    "use_liger_kernel": ("kernels", "both replace the forwards of the same modules"),
    "use_kernels": ("kernels", "transformers sets its own kernels anew whenever the model turns to or from training"),
    "torch_compile": ("kernels", "torch.compile cannot trace the forwards that ours run in"),
    "activation_offloading": ("checkpointing", "both move activations, on streams that know nothing of each other"),
}
"""Option of SFTConfig or of loading the model -> the option of ours that it cannot be combined with, and why."""
PEACE = {"kernels": False, "checkpointing": "host"}
"""Option of ours -> the value with which it fights nothing."""

LOSS = "linear_cross_entropy"
CHUNKED_LOSS, FUSED_HEAD = "_patch_chunked_ce_lm_head", "add_fused_lm_head"
"""TRL's functions (1.9; 1.16) that replace the forward of a model instance by one that computes the loss."""
READS_LOGITS = {
    name: f"with loss_type={name!r} TRL reads the logits at every step, so they take their full memory; leaving "
    "loss_type at its default avoids that"
    for name in ("nll", "dft")
}


def patch_config(module: ModuleType) -> None:
    """Give ``module.SFTConfig`` the field ``backend``."""
    add_field(module.SFTConfig)


def patch_trainer(module: ModuleType) -> None:
    """Let ``module.SFTTrainer`` take the keyword ``backend``."""
    add_keyword(module.SFTTrainer, {"model", "args", "processing_class"}, _construct)


def _construct(trainer: Any, original: Callable[..., None], call: inspect.BoundArguments, config: SlothConfig) -> None:
    """TRL's own ``__init__`` with the three phases around it; a failure takes all of ours back."""
    import torch
    from transformers import ProcessorMixin

    from sloth_backend import phases
    from sloth_backend.run import Run

    model, args = call.arguments["model"], call.arguments.get("args")
    loaded = model if isinstance(model, torch.nn.Module) else None
    checkpointing = bool(_setting(args, "gradient_checkpointing"))
    run = Run(
        "trl",
        config,
        gradient_checkpointing=checkpointing,
        tokens_per_pass=_tokens_per_pass(args),
        problems=tuple(_problems(model, args, config)),
    )
    session = phases.begin(run, loaded)
    try:
        if call.arguments.get("processing_class") is None:
            call.arguments["processing_class"] = _load_processor(original, model, args)
        processor = call.arguments["processing_class"]
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        phases.before_data(session, tokenizer)
        if loaded is not None:
            phases.after_load(session, loaded, tokenizer)
        original(*call.args, **call.kwargs)
        if loaded is None:
            phases.after_load(session, trainer.model, tokenizer)
        session.run = replace(session.run, optimizer_bytes=_optimizer_bytes(trainer))
        with _loss_seam(session, phases.base_model(trainer.model), trainer.args):
            phases.before_train(session, trainer.model, trainer)
    except BaseException:
        session.edits.rollback()
        raise


def _problems(model: Any, args: Any, config: SlothConfig) -> list[str]:
    """Options of TRL and transformers that cannot be combined with ``config``."""
    asked = {name for name in FIGHTS if _setting(args, name)}
    if getattr(model, "use_kernels", False) or (_setting(args, "model_init_kwargs") or {}).get("use_kernels"):
        asked.add("use_kernels")
    return [
        f"{name}=True cannot be combined with {ours}={getattr(config, ours)!r} of backend='sloth': {why}. "
        f"Set {name}=False, or {ours}={PEACE[ours]!r} among the options of the backend."
        for name, (ours, why) in FIGHTS.items()
        if name in asked and getattr(config, ours) not in (PEACE[ours], ())
    ]


def _setting(args: Any, name: str) -> Any:
    """An option as the trainer will see it: that of ``args``, else SFTConfig's default."""
    from trl.trainer.sft_config import SFTConfig

    return getattr(args, name, getattr(SFTConfig, name, None))


def _tokens_per_pass(args: Any) -> int | None:
    """Rows of a micro-batch x the length to which TRL truncates or packs; None where it does neither."""
    length, multiple = _setting(args, "max_length"), _setting(args, "pad_to_multiple_of") or 1
    if length is None or (_setting(args, "dataset_kwargs") or {}).get("skip_prepare_dataset"):
        return None
    return _setting(args, "per_device_train_batch_size") * -(-length // multiple) * multiple


def _optimizer_bytes(trainer: Any) -> float:
    """Bytes of optimizer state for each trained parameter; an optimizer of the user's making counts as AdamW."""
    import torch

    from sloth_backend.optimizers import state_bytes

    name = str(getattr(trainer.args.optim, "value", trainer.args.optim)) if trainer.optimizer is None else ""
    embeddings = [module.weight for module in trainer.model.modules() if isinstance(module, torch.nn.Embedding)]
    return state_bytes(name, trainer.model.parameters(), embeddings)


def _load_processor(original: Callable[..., None], model: Any, args: Any) -> Any:
    """The tokenizer or processor as TRL would load it, so that it is mended before TRL uses it."""
    from transformers import AutoProcessor
    from trl.trainer.utils import get_config_model_id

    name, revision = model, None
    if not isinstance(model, str):
        name = get_config_model_id(model.config)
    elif "model_revision" in inspect.unwrap(original).__code__.co_varnames:  # TRL 1.9 takes the default revision's
        revision = (_setting(args, "model_init_kwargs") or {}).get("revision")
    trust = _setting(args, "trust_remote_code")
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust)


@contextmanager
def _loss_seam(session: Session, model: nn.Module, args: Any) -> Iterator[None]:
    """Settle who computes the loss, while phase C runs inside.

    TRL 1.9 by default replaces the model's forward by one that computes the loss in chunks. It is taken away, so that
    a plugin can make the model's own forward compute the loss, and put back where none did. A head that TRL calls
    by an argument of its own (1.16) stays. Where TRL reads the logits itself, a Finding says what that costs.
    """
    from sloth_backend.findings import Finding

    forward = vars(model).get("forward")
    if not session.run.config.allows(LOSS):
        yield
    elif _made_by(forward, CHUNKED_LOSS):
        _take_away(session, model)
        yield
        if not session.report().of(action="changed", capability=LOSS):
            session.edits.set(model, "forward", forward)
    elif _made_by(forward, FUSED_HEAD):
        session.findings.append(Finding("skipped", "loss", "TRL's own fused head computes the loss", LOSS, "trl"))
        yield
    else:
        if args.loss_type in READS_LOGITS:
            session.findings.append(Finding("warned", "loss", READS_LOGITS[args.loss_type], LOSS, "trl"))
        yield


def _made_by(forward: Any, function: str) -> bool:
    """Whether ``forward`` is a method that TRL's ``function`` defined inside itself."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and code.co_qualname.startswith(f"{function}.")


def _take_away(session: Session, model: nn.Module) -> None:
    """Set the forward that TRL's patches wrap: the class's own, or one that the instance had before them."""
    forward = vars(model)["forward"]
    while _made_by(forward, CHUNKED_LOSS):
        forward = inspect.getclosurevars(forward.__func__).nonlocals["original_forward"]
    if getattr(forward, "__func__", None) is type(model).forward:
        session.edits.remove(model, "forward")
    else:
        session.edits.set(model, "forward", forward)
