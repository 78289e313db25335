"""Rows laid end to end stay apart: a decoder is handed a mask that attention reads as lengths, not as a square.

transformers hands a mask of four dimensions to the layers as it is. Layers that run as programs read its documents;
any other code that touches it sees the real mask. A probe on the model itself decides whether rows are kept apart:
layers that mix tokens in other ways (convolutions, recurrences) are seen there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sloth_backend.findings import Edits, Finding
from sloth_kernels.documents import DocumentMask, Documents, documents_of, remember
from sloth_plugins.batch_fusion.rows import positions
from sloth_plugins.layer_programs.probe import TOLERANCE, evaluating

CAPABILITY = "documents"
ATTENTION = ("sdpa", "eager")
"""Implementations of transformers that read such a mask; the flash ones find documents by themselves."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Options of a config that bound what attention sees, in tokens: longer documents keep the host's own mask."""
PROBED = (5, 3)
"""Lengths of the two documents that the model is asked about."""
MARK = "_sloth_documents"


def keep_apart(model: Any, edits: Edits) -> Finding:
    """Give ``model`` the mask wherever positions start anew; a Finding that says so, or why not."""
    reason = _obstacle(model)
    if reason is None:
        decoder = model.get_decoder()
        handle = decoder.register_forward_pre_hook(_mask_documents(decoder, _window(model.config)), with_kwargs=True)
        try:
            reason = _disagreement(decoder, model.get_input_embeddings().weight)
        except Exception as error:
            reason = f"the model does not run on rows laid end to end: {type(error).__name__}: {error}"
        if reason is None:
            edits.on_undo(handle.remove)
            edits.set(model, MARK, True)
            return Finding("changed", "attention", "rows laid end to end attend to themselves alone", CAPABILITY)
        handle.remove()
    return Finding("skipped", "attention", reason, CAPABILITY)


def kept_apart(model: nn.Module) -> bool:
    """Whether ``keep_apart`` has changed ``model``."""
    return MARK in vars(model)


def longest_document(model: Any) -> int | None:
    """Tokens up to which documents are kept apart by us; None for any."""
    return _window(model.config)


def _obstacle(model: Any) -> str | None:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name not in ATTENTION:
        return f"attention is {name!r}, which is not one of {', '.join(ATTENTION)}"
    if not isinstance(getattr(model, "get_decoder", lambda: None)(), nn.Module):
        return "the model does not tell its decoder"
    return None


def _window(config: Any) -> int | None:
    sizes = [size for name in WINDOWS if (size := getattr(config, name, None))]
    return min(sizes, default=None)


def _mask_documents(decoder: nn.Module, window: int | None) -> Callable[..., Any]:
    owner = weakref.ref(decoder)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        documents = _documents(args, kwargs) if module is owner() else None
        if documents is None or len(documents.lengths) == 1 or (window and documents.longest > window):
            return None
        return args, {**kwargs, "attention_mask": DocumentMask(documents)}

    return hook


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
    allowed = TOLERANCE.get(alone.dtype, 0.0)
    return (
        None if off <= allowed else f"a row beside another is {off:.1e} off, more than the {allowed:.1e} of roundings"
    )


def _run(decoder: nn.Module, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    at = positions(lengths, ids.device)[None]
    remember(at, lengths)
    return decoder(input_ids=ids[None], position_ids=at, use_cache=False)[0]
