"""The loss without the logits, and without a copied forward.

While the model's forward runs with labels, ``lm_head`` answers with LazyLogits; ``model.loss_function`` hands hidden
states and weight to the fused op; the outputs carry token counts. Whoever needs logits gets them, computed then.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from sloth_backend.findings import Edits, Finding
from sloth_backend.run import find_embedding
from sloth_kernels.labelled_rows import LabelledRows
from sloth_kernels.op import Op
from sloth_plugins.kernel_patching.lazy_logits import LazyLogits, Product, replaces_rows

CAPABILITY = "linear_cross_entropy"
COMPUTED = (
    "all logits were computed before the loss, which takes memory and time: lm_head was wrapped or given hooks after "
    "the backend was switched on (an adapter? put it in before), or the model does to its logits what is not known"
)
_deferring: ContextVar[Deferral | None] = ContextVar("sloth_deferring_logits", default=None)


@dataclass
class Deferral:
    """One forward with labels, and which rows have one: looked for before the layers run, ready when they have."""

    labels: torch.Tensor | None
    shift_labels: torch.Tensor | None
    ignore_index: int = -100
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the op."""

    def __post_init__(self) -> None:
        self.shifted = _shifted(self.labels, self.shift_labels, self.ignore_index)
        self.rows = LabelledRows(self.shifted, self.ignore_index)

    def rows_of(self, shifted: torch.Tensor, labels: Any, shift_labels: Any, ignore_index: int) -> LabelledRows | None:
        """The rows, where the loss is asked for with the labels that the forward was called with."""
        same = labels is self.labels and shift_labels is self.shift_labels and ignore_index == self.ignore_index
        return self.rows if same and shifted.device == self.shifted.device else None


def limit_logits(size: int, rounded_sums: bool = False) -> None:
    """Let the loss of the forward that is running hold ``size`` bytes of logits at a time; see the op for the rest."""
    deferral = _deferring.get()
    if deferral is not None:
        deferral.options |= {"logits_bytes": size, "rounded_sums": rounded_sums}


def _shifted(labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The label of each position (T,): the next token."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def patch_loss(model: Any, op: Op, edits: Edits) -> Finding:
    """Make ``model`` (a causal LM inside any wrapper) compute its loss by ``op``; the Finding says if it could."""
    head = _active_head(model)
    obstacle = _obstacle(model, head)
    if obstacle:
        return Finding("skipped", "loss", f"{obstacle}; the model computes its logits and loss itself", CAPABILITY)
    edits.set(head, "forward", types.MethodType(_lazy_forward(type(head).forward), head))
    _set_loss_function(model, _fused_loss(op.fn), edits)
    own = head.base_layer if replaces_rows(head) else head
    forward = _deferring_forward(type(model).forward, own._parameters, weakref.ref(own.weight))
    edits.set(model, "forward", types.MethodType(forward, model))
    return Finding("changed", "loss", f"{op.name} kernel over {_story(head)}; logits only on demand", CAPABILITY)


def _story(head: Any) -> str:
    if replaces_rows(head):
        rows = sum(len(head.token_indices[name]) for name in head.active_adapters)
        return f"a head of which {rows} rows are trained"
    return f"the {'trained' if head.weight.requires_grad else 'frozen'} head"


def _active_head(model: Any) -> Any:
    """The output projection that runs: PEFT keeps the trained one, or the one with trained rows, inside a wrapper."""
    head: Any = find_embedding(model, "output")
    if isinstance(getattr(head, "token_adapter", None), nn.Module) and not (
        head._forward_hooks or head._forward_pre_hooks
    ):
        return head.token_adapter
    copies, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", ())
    return copies[active[0]] if copies and len(active) == 1 and active[0] in copies else head


def _obstacle(model: Any, head: Any) -> str | None:
    """Why the loss cannot be fused, or None."""
    if "forward" in vars(model):
        return f"the model's forward is already replaced, by {vars(model)['forward'].__module__}"
    if not calls_loss_function(type(model).forward):
        return f"{type(model).__name__}.forward does not call self.loss_function"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss function is {_name(model.loss_function)}, not ForCausalLMLoss"
    return _head_obstacle(head)


def _head_obstacle(head: Any) -> str | None:
    kind = type(head).__name__
    if replaces_rows(head):
        return _rows_obstacle(head)
    if hasattr(head, "base_layer"):
        return f"lm_head carries an adapter ({kind})"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"lm_head is a {kind}, not a plain nn.Linear"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "lm_head has hooks or a replaced forward"
    if "weight" not in head._parameters or not head.weight.is_floating_point():
        return "lm_head's weight is quantised or computed"
    return None


def _rows_obstacle(head: Any) -> str | None:
    """The same for a head some of whose rows are trained by themselves."""
    base = head.base_layer
    if getattr(base, "bias", None) is not None:
        return "lm_head has a bias, which PEFT leaves out of its trained rows' product"
    if len(head.active_adapters) != 1 or not _computes_rows(head):
        return f"lm_head's trained rows come from {len(head.active_adapters)} adapters, or are merged"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "lm_head has hooks or a replaced forward"
    return _head_obstacle(base)


def _computes_rows(head: Any) -> bool:
    """Whether such a head writes its rows over the base's now: not where the adapter is off or merged."""
    return not head.disable_adapters and not head.merged and bool(head.active_adapters)


def calls_loss_function(forward: Any) -> bool:
    """Whether a forward, or what it wraps, asks ``self.loss_function`` for the loss."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__name__)


def _set_loss_function(model: Any, loss: Callable[..., Any], edits: Edits) -> None:
    """Through transformers' public setter; ``_loss_function`` is the one attribute it writes."""
    edits.set(model, "_loss_function", loss)


def _lazy_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        gone = not _outlasts_its_call(self) or (replaces_rows(self) and not _computes_rows(self))
        if _deferring.get() is None or gone:
            return original(self, hidden)
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        product = Product(self, functools.partial(original, self), hidden, autocast)
        return LazyLogits(product, autocast or hidden.dtype)

    return forward


def _outlasts_its_call(head: nn.Module) -> bool:
    """Whether the head's weight will be there when the loss is computed: with hooks of its own, it may not.

    Accelerate 1.15 makes the head an FSDP2 unit of its own, whose parameters stay gathered until its backward is over:
    one hook before, which gathers them, and one behind, which leaves them.
    """
    before, behind = len(head._forward_pre_hooks), len(head._forward_hooks)
    if not before and not behind:
        return True
    state = getattr(head, "_get_fsdp_state", lambda: None)()
    group = getattr(state, "_fsdp_param_group", None)
    return before == behind == 1 and getattr(group, "_reshard_after_forward", True) is False


def _deferring_forward(
    original: Callable[..., Any], own: Mapping[str, Any], patched: weakref.ref[torch.Tensor]
) -> Callable[..., Any]:
    """``own`` are the head's parameters, ``patched`` its weight as it was before anything could shard it.

    A weight that was replaced since may be there for the forward alone, and whoever evaluates looks at the logits
    later: those are computed while it is.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and args:
            labels = signature.bind_partial(self, *args, **kwargs).arguments.get("labels")
        if labels is None and shift_labels is None:
            return original(self, *args, **kwargs)
        token = _deferring.set(Deferral(labels, shift_labels))
        try:
            outputs = _counted(original(self, *args, **kwargs))
            if not torch.is_grad_enabled() and own.get("weight") is not patched():
                _compute_now(outputs)
            return outputs
        finally:
            _deferring.reset(token)

    return forward


def _compute_now(outputs: Any) -> None:
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, LazyLogits):
        logits.materialize()


def _fused_loss(fn: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    @functools.wraps(ForCausalLMLoss)
    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(logits, LazyLogits):
            if _deferring.get() is not None:
                warnings.warn(COMPUTED, RuntimeWarning, stacklevel=2)
            plain: Any = ForCausalLMLoss
            return plain(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        product, epilogue, deferral = logits.product, logits.epilogue, _deferring.get()
        shifted = _shifted(labels, shift_labels, ignore_index).to(product.hidden.device)
        rows = deferral.rows_of(shifted, labels, shift_labels, ignore_index) if deferral else None
        product.sums = fn(
            product.hidden.reshape(-1, product.hidden.shape[-1]),
            product.weight(),
            shifted,
            product.head.bias,
            scale=epilogue.logit_scale,
            softcap=epilogue.softcap,
            ignore_index=ignore_index,
            **({"rows": rows} if rows is not None else {}),
            **(deferral.options if deferral else {}),
        )
        return _normalise(product.sums, num_items_in_batch)

    return loss_function


def _normalise(sums: Any, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Sum over the host's own count of items, else the mean over the valid tokens (0 where there are none)."""
    if num_items is None:
        return sums.loss_sum / sums.n_valid.clamp(min=1)
    return sums.loss_sum / (num_items.to(sums.loss_sum.device) if torch.is_tensor(num_items) else num_items)


class TokenCounts:
    """Mixed into a model's output class: what a host reports without looking at logits.

    The counts travel with ``logits``, so they survive accelerate's copying of outputs.
    """

    @property
    def num_correct_tokens(self) -> torch.Tensor:
        """Tokens whose label is the most likely one."""
        return self.logits.product.sums.n_correct  # type: ignore[attr-defined]

    @property
    def entropy_sum(self) -> torch.Tensor:
        """Sum of the predictive distributions' entropies over valid tokens, in nats."""
        return self.logits.product.sums.entropy_sum  # type: ignore[attr-defined]

    @property
    def num_valid_tokens(self) -> torch.Tensor:
        """Tokens with a label."""
        return self.logits.product.sums.n_valid  # type: ignore[attr-defined]


def _counted(outputs: Any) -> Any:
    """The outputs with TokenCounts mixed in, where their logits stayed lazy and the loss was fused."""
    logits = getattr(outputs, "logits", None)
    if isinstance(outputs, ModelOutput) and isinstance(logits, LazyLogits) and logits.product.sums is not None:
        outputs.__class__ = _counting_class(type(outputs))
    return outputs


@functools.cache
def _counting_class(cls: type) -> type:
    return type(cls.__name__, (TokenCounts, cls), {"__module__": __name__})
