"""One call of attention: what the model asks for, the tensors it gives, the form of its mask, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sloth_kernels.documents import DocumentMask


@dataclass(frozen=True)
class AttentionSpec:
    """What a model's attention computes; hashable.

    ``softcap`` (Gemma 2): scores become softcap tanh(score / softcap) before the mask. ``causal`` and ``window`` say
    what holds where no mask is given: query i sees the keys j <= i, of which a window leaves i - window < j. Where one
    is given it says everything, but for a ``DocumentMask``: it is causal, and ``window`` holds within each document.
    ``dropout`` drops probabilities: 0 outside training.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True
    window: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                f"attention: window={self.window}, causal={self.causal}; expected a causal window of at least 1 key: "
                "give any other pattern as a mask"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"attention: dropout={self.dropout}; expected at least 0 and less than 1")


class Inputs(NamedTuple):
    """One call as a backend reads it; ``form`` is "full", "causal", "window", "mask", or what ``mask_form`` says."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    spec: AttentionSpec
    form: str

    @property
    def causal(self) -> bool:
        return self.form == "causal"


def band(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """The causal or windowed mask written out, bool (S, T); the first query stands at the first key."""
    distance = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    seen = distance >= 0
    return seen if spec.window is None else seen & (distance < spec.window)


def written(x: Inputs) -> Tensor:
    """The mask of a call that has none, or has documents, as an ordinary bool tensor."""
    return x.mask.documents.seen(x.spec.window) if isinstance(x.mask, DocumentMask) else band(x.q, x.k, x.spec)


def mask_form(mask: Tensor) -> str:
    """What documents of one length are ("rows"), those of several ("documents"), and every other mask ("mask")."""
    if isinstance(mask, DocumentMask):
        return "documents" if mask.documents.equal is None else "rows"
    return "mask"


def inputs_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, spec: AttentionSpec
) -> Inputs:
    """The call with its form: that of a mask where one is given, or has to be written out as causal sizes differ."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is not None:
        form = mask_form(mask)
    elif not spec.causal or queries == keys == 1:
        form = "full"
    elif queries != keys:
        mask, form = band(q, k, spec), "mask"
    else:
        form = "window" if spec.window is not None and spec.window < keys else "causal"
    return Inputs(q, k, v, mask, sinks, spec, form)


def check_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> None:
    """Raise ``ValueError`` where shapes, dtypes or devices do not fit one another."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {shapes}; expected q (B, Hq, S, D), k (B, Hk, T, D) and v (B, Hk, T, E)")
    if q.shape[3] != k.shape[3] or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(f"attention: {shapes}; expected q and k of one D, and Hq a multiple of Hk")
    tensors = [t for t in (q, k, v, mask, sinks) if t is not None]
    if len({t.device for t in tensors}) > 1 or len({t.dtype for t in (q, k, v)}) > 1:
        said = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise ValueError(f"attention: got {said}; expected q, k and v of one dtype, and everything on one device")
    if isinstance(mask, DocumentMask) and (q.shape[0] != 1 or not q.shape[2] == k.shape[2] == mask.shape[2]):
        raise ValueError(f"attention: {shapes}; expected B = 1 and S = T = {mask.shape[2]}, the documents' tokens")
    if mask is not None and not _mask_fits(mask, (*q.shape[:3], k.shape[2])):
        said, scores = f"{mask.dtype} {tuple(mask.shape)}", (*q.shape[:3], k.shape[2])
        raise ValueError(f"attention: mask {said}; expected bool or floating, broadcastable to {scores}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"attention: sinks {tuple(sinks.shape)}; expected one for each of {q.shape[1]} query heads")


def _mask_fits(mask: Tensor, scores: tuple[int, ...]) -> bool:
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    known = mask.dtype == torch.bool or mask.is_floating_point()
    return known and mask.ndim <= 4 and all(n in (1, m) for n, m in sizes)
