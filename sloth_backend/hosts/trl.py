"""TRL: ``SFTTrainer(..., backend="sloth")``, ``DPOConfig(backend="sloth")``, ``trl sft --backend sloth``...

``autoload`` calls ``patch_trainer`` with TRL's modules once they are imported; the configurations inherit their field
``backend`` from TrainingArguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sloth_backend.hosts.trainers import LOSS, Kind, switch_on

if TYPE_CHECKING:
    from torch import nn

    from sloth_backend.phases import Session

CHUNKED_LOSS, FUSED_HEAD = "_patch_chunked_ce_lm_head", "add_fused_lm_head"
"""TRL's functions (1.9; 1.16) that replace the forward of a model instance by one that computes the loss."""
READS_LOGITS = {
    name: f"with loss_type={name!r} TRL reads the logits at every step, so they take their full memory; leaving "
    "loss_type at its default avoids that"
    for name in ("nll", "dft")
}


@contextmanager
def loss_seam(session: Session, model: nn.Module, args: Any) -> Iterator[None]:
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


SCORES = "compares the scores of two texts: there are no logits over the vocabulary"
DIVERGENCE = "takes the hidden states, and computes the divergence from its teacher in chunks of the vocabulary itself"
LEFT = {"truncation_side": "left", "padding_side": "left"}


def logps(model: nn.Module) -> str:
    """Where a trainer takes those of a text from."""
    if _made_by(vars(model).get("forward"), FUSED_HEAD):
        return "takes log-probabilities from TRL's own fused head"
    return "takes log-probabilities from the logits of every token, so they take their full memory"


def _kind(name: str, loader: str, folder: str = "trl.trainer", **facts: Any) -> tuple[str, Kind]:
    """A row of ``KINDS``; ``folder`` is the package of the modules ``*_trainer`` and ``*_config``."""
    stem = f"{folder}.{name.lower()}"
    return f"{stem}_trainer", Kind("trl", f"{name}Trainer", f"{stem}_config:{name}Config", loader, **facts)


KINDS = dict(
    (
        _kind("SFT", "AutoProcessor", length="max_length", seam=loss_seam),
        _kind("DPO", "AutoProcessor", length="max_length", collator_cuts=True, rows=2, reads_logits=logps),
        _kind("KTO", "AutoProcessor", length="max_length", collator_cuts=True, reads_logits=logps),
        _kind("Reward", "AutoTokenizer", length="max_length", rows=2, reads_logits=SCORES),
        _kind("GRPO", "AutoProcessor", loading=LEFT, reads_logits=logps),
        _kind("RLOO", "AutoProcessor", loading=LEFT, reads_logits=logps),
        _kind("Distillation", "AutoProcessor", loading=LEFT, reads_logits=DIVERGENCE, beside="teacher_model"),
        _kind("CPO", "AutoTokenizer", "trl.experimental.cpo", length="max_length", rows=2, reads_logits=logps),
        _kind("ORPO", "AutoTokenizer", "trl.experimental.orpo", length="max_length", rows=2, reads_logits=logps),
    )
)
"""Module of TRL -> its trainer; Distillation is among them since TRL 1.14."""


def patch_trainer(module: ModuleType) -> None:
    """Let the trainer of ``module`` take the keyword ``backend``."""
    kind = KINDS[module.__name__]
    switch_on(getattr(module, kind.trainer), kind)
