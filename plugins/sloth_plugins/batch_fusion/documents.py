"""Rows laid end to end stay apart: a decoder is handed a mask that attention reads as lengths, not as a square.

transformers hands a mask of four dimensions to the layers as it is. Layers that run as programs read its documents;
any other code that touches it sees the real mask. A probe on the model itself decides whether rows are kept apart:
layers that mix tokens in other ways (convolutions, recurrences) are seen there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sloth_backend.findings import Edits, Finding
from sloth_kernels.documents import DocumentMask, Documents, documents_of, remember
from sloth_plugins.batch_fusion.rows import positions
from sloth_plugins.layer_programs.probe import evaluating, tolerance
from sloth_plugins.program_layers import forget_weights

CAPABILITY = "documents"
ATTENTION = ("sdpa", "eager")
"""Implementations of transformers that read such a mask; the flash ones find documents by themselves."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Options of a config that bound what attention sees, in tokens: longer documents keep the host's own mask."""
PROBED = (5, 3)
"""Lengths of the two documents that the model is asked about."""
MARK = "_sloth_documents"
PADDED = ("cuda",)
"""Types of devices on which the length of a pass is rounded up."""
TOKENS = ("input_ids", "inputs_embeds", "position_ids")
UNDERSTOOD = frozenset({*TOKENS, "past_key_values", "use_cache", "cache_position", "num_items_in_batch", "return_dict"})
"""Arguments of a decoder that have something for each token, and those that do not matter to it."""


def keep_apart(model: Any, edits: Edits) -> Finding:
    """Give ``model`` the mask wherever positions start anew; a Finding that says so, or why not."""
    reason = _obstacle(model)
    if reason is None:
        decoder = model.get_decoder()
        hooks = Hooks(decoder, longest_document(model.config), pads=not drops(model))
        try:
            reason = _disagreement(decoder, model.get_input_embeddings().weight)
        except Exception as error:
            reason = f"the model does not run on rows laid end to end: {type(error).__name__}: {error}"
        finally:
            forget_weights(model)
        if reason is None:
            edits.on_undo(hooks.remove)
            edits.set(model, MARK, True)
            return Finding("changed", "attention", "rows laid end to end attend to themselves alone", CAPABILITY)
        hooks.remove()
    return Finding("skipped", "attention", reason, CAPABILITY)


def drops(model: Any) -> bool:
    """Whether training draws random numbers by the shape of a batch."""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return dropout or bool(getattr(model.config, "attention_dropout", 0.0))


def kept_apart(model: nn.Module) -> bool:
    """Whether ``keep_apart`` has changed ``model``."""
    return MARK in vars(model)


def longest_document(config: Any) -> int | None:
    """Tokens up to which documents are kept apart by us; None for any."""
    sizes = [size for name in WINDOWS if (size := getattr(config, name, None))]
    return min(sizes, default=None)


def _obstacle(model: Any) -> str | None:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name not in ATTENTION:
        return f"attention is {name!r}, which is not one of {', '.join(ATTENTION)}"
    if not isinstance(getattr(model, "get_decoder", lambda: None)(), nn.Module):
        return "the model does not tell its decoder"
    if any(p.numel() == 0 for p in model.parameters()):
        return "its parameters are spread over processes already: it cannot run, and be looked at, before it trains"
    return None


class Hooks:
    """What is done around a decoder's forward when its positions start anew.

    Rows are followed by a few tokens more, a document of their own, which nobody sees: sums of lengths are all
    different, and every new one costs the first pass that has it a search for each matrix product's kernel.

    Args:
        decoder: whose forward it is.
        window: documents of more tokens keep the host's own mask; None for no limit.
        pads: whether tokens may be added.
    """

    def __init__(self, decoder: nn.Module, window: int | None, pads: bool) -> None:
        self.owner, self.window, self.pads = weakref.ref(decoder), window, pads
        self.tokens: int | None = None
        """Those of the call that runs, where some were added."""
        before = decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        self.handles = before, decoder.register_forward_hook(self.after)

    def remove(self) -> None:
        """Leave the decoder as it was."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the decoder the mask of its documents, and tokens up to a multiple of ``_step``."""
        self.tokens = None
        documents = _documents(args, kwargs) if module is self.owner() else None
        if documents is None or len(documents.lengths) == 1 or (self.window and documents.longest > self.window):
            return None
        missing = 0 if args or documents.equal else self._missing(documents, kwargs)
        if missing:
            self.tokens = documents.tokens
            kwargs = {name: _longer(name, value, missing) for name, value in kwargs.items()}
            documents = Documents((*documents.lengths, missing), documents.device)
        return args, {**kwargs, "attention_mask": DocumentMask(documents)}

    def _missing(self, documents: Documents, kwargs: Mapping[str, Any]) -> int:
        """How many tokens to add."""
        pads = self.pads and documents.device.type in PADDED and not _asks_for_more(kwargs)
        return -documents.tokens % _step(documents.tokens) if pads else 0

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the hidden states of added tokens away."""
        tokens, self.tokens = self.tokens, None
        if tokens is None:
            return None
        if isinstance(output, tuple):
            return (output[0][:, :tokens], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, :tokens]
        return output


def _step(tokens: int) -> int:
    """Few sums of lengths, each at most a sixteenth too long where it is long."""
    return max(128, 1 << tokens.bit_length() >> 5)


def _asks_for_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether the call has or wants something else for each token than what is made longer here."""
    return any(value is not None and value is not False for name, value in kwargs.items() if name not in UNDERSTOOD)


def _longer(name: str, value: Any, missing: int) -> Any:
    """An argument with ``missing`` tokens more."""
    if value is None or name not in TOKENS:
        return value
    if name == "position_ids":
        more = torch.arange(missing, device=value.device, dtype=value.dtype)[None]
        return torch.cat([value, more], 1)
    return nn.functional.pad(value, (0,) * (2 * (value.ndim - 2)) + (0, missing))


def _documents(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Documents | None:
    """Those that a call's positions tell of; None where it is another kind of call."""
    at = kwargs.get("position_ids")
    if len(args) > 1 or at is None or at.ndim != 2 or at.shape[0] != 1 or at.shape[1] < 2:
        return None
    cache = kwargs.get("past_key_values")
    if kwargs.get("attention_mask") is not None or (cache is not None and cache.get_seq_length()):
        return None
    return documents_of(at)


def _disagreement(decoder: nn.Module, embeddings: Tensor) -> str | None:
    """Why rows would not be kept apart; None if they are: the second of two is asked beside each of two others."""
    vocabulary, device = embeddings.shape[0], embeddings.device
    ids = (torch.arange(sum(PROBED), device=device) * 7919 + 11) % vocabulary
    other = ids.clone()
    other[: PROBED[0]] = (other[: PROBED[0]] * 31 + 7) % vocabulary
    with evaluating(decoder):
        alone = _run(decoder, ids[PROBED[0] :], PROBED[1:])
        beside, beside_other = (_run(decoder, x, PROBED)[:, PROBED[0] :] for x in (ids, other))
    if not torch.equal(beside, beside_other):
        return "what a row gives depends on the row before it: the model mixes tokens outside of attention"
    off = (beside.double() - alone.double()).norm() / alone.double().norm()
    allowed = tolerance(decoder, alone.dtype)
    return (
        None if off <= allowed else f"a row beside another is {off:.1e} off, more than the {allowed:.1e} of roundings"
    )


def _run(decoder: nn.Module, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    at = positions(lengths, ids.device)[None]
    remember(at, lengths)
    return decoder(input_ids=ids[None], position_ids=at, use_cache=False)[0]
