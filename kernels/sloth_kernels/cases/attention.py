"""The calls that test and time attention: masks, windows, softcaps, sinks, groups of heads, odd sizes, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sloth_kernels.attention_inputs import AttentionSpec
from sloth_kernels.documents import DocumentMask, Documents
from sloth_kernels.op import Call, Case, Timing

PADDED = (3, 5)
"""Rows of a padded batch lack this many tokens, the first and the last one."""


def padding(batch: int, seq: int, side: str, device: torch.device) -> Tensor:
    """Which tokens are no padding, bool (B, S)."""
    place = torch.arange(seq, device=device).expand(batch, seq)
    lacking = torch.linspace(*PADDED, batch).round().long().clamp(max=seq - 1).to(device)[:, None]
    return place >= lacking if side == "left" else place < seq - lacking


def make_mask(kind: str, batch: int, seq: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``kind``: "none"; "bool" or "float" with "left" or "right" padding as in "bool-left", "bool-left-window7" with a
    window; "bias" is random numbers to add; "documents-3-1-9" is one row of documents of these lengths. Float masks
    have the dtype's least number where a key is hidden, as transformers makes them, and show a row without keys the
    first one: what it is else depends on the dtype."""
    if kind == "none":
        return None
    if kind == "bias":
        generator = torch.Generator(device).manual_seed(9)
        return torch.randn(1, 1, seq, seq, dtype=dtype, device=device, generator=generator)
    if kind.startswith("documents"):
        return DocumentMask(Documents([int(length) for length in kind.split("-")[1:]], device))
    form, side, *window = kind.split("-")
    distance = torch.arange(seq, device=device)[:, None] - torch.arange(seq, device=device)
    seen = (distance >= 0) & (distance < (int(window[0].removeprefix("window")) if window else seq))
    seen = seen & padding(batch, seq, side, device)[:, None, None, :]
    if form == "bool":
        return seen
    seen[..., 0] |= ~seen.any(-1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


def make_call(
    dtype: torch.dtype,
    device: torch.device,
    spec: AttentionSpec,
    batch: int,
    seq: int,
    heads: tuple[int, int],
    width: tuple[int, int],
    mask: str = "none",
    sinks: bool = False,
    layout: str = "projection",
    keys: int | None = None,
) -> Call:
    """``layout`` of q, k and v: "projection" (B, S, H, D) seen as (B, H, S, D), contiguous "heads" first, slices of one
    "fused" projection, or "strided" heads whose elements lie apart."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator).requires_grad_()

    sizes = [(heads[0], seq, width[0]), (heads[1], keys or seq, width[0]), (heads[1], keys or seq, width[1])]
    if layout == "heads":
        q, k, v = (randn(batch, *size) for size in sizes)
    elif layout == "fused":
        counts = (heads[0], heads[1], heads[1])
        q, k, v = (t.transpose(1, 2) for t in randn(batch, seq, sum(counts), width[0]).split(counts, 2))
    elif layout == "strided":
        q, k, v = (randn(batch, n, rows, 2 * columns)[..., ::2] for n, rows, columns in sizes)
    else:
        q, k, v = (randn(batch, rows, n, columns).transpose(1, 2) for n, rows, columns in sizes)
    made = randn(heads[0]) if sinks else None
    return (q, k, v, make_mask(mask, batch, seq, dtype, device), made), {"spec": spec}


def case(
    mask: str = "none",
    batch: int = 2,
    seq: int = 13,
    heads: tuple[int, int] = (4, 2),
    width: int | tuple[int, int] = 16,
    *,
    sinks: bool = False,
    layout: str = "projection",
    keys: int | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Case:
    """One call; scale is the usual 1 / √D."""
    widths = (width, width) if isinstance(width, int) else width
    spec = AttentionSpec(widths[0] ** -0.5, softcap, causal, window)

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        return make_call(dtype, device, spec, batch, seq, heads, widths, mask, sinks, layout, keys)

    extras = {"softcap": softcap, "window": window, "sinks": sinks or None, "keys": keys, "full": not causal or None}
    names = [f"{name}{'' if value is True else value}" for name, value in extras.items() if value is not None]
    size = f"{batch}x{seq}x{heads[0]}:{heads[1]}x{'+'.join(map(str, sorted(set(widths))))}"
    return Case("-".join([mask, *names, layout, size]), make)


MASKS = ("bool-left", "bool-right", "float-left", "float-right", "bool-left-window4", "float-right-window4", "bias")


def cases() -> Sequence[Case]:
    """Every mask, with and without softcap and sinks; every layout; heads of 8 to 256; odd sizes; documents."""
    return [
        case(),
        case(causal=False),
        case(window=5),
        case(window=2),
        case(window=5, softcap=3.0),
        case(softcap=3.0),
        case(sinks=True),
        case(window=5, sinks=True),
        case(softcap=3.0, sinks=True),
        *(case(mask) for mask in MASKS),
        *(case(mask, heads=(6, 2), softcap=3.0) for mask in ("bool-left", "float-right")),
        *(case(mask, heads=(6, 2), sinks=True) for mask in ("bool-left", "float-right")),
        *(case(layout=layout) for layout in ("heads", "fused", "strided")),
        case("bool-right", layout="heads"),
        *(case(width=width, heads=(3, 1)) for width in (8, 20, 64, 96, 128, 192, 256)),
        case(width=(24, 16)),
        case(seq=1, batch=3),
        case(seq=1, batch=3, sinks=True),
        case("bool-right", seq=1),
        case(keys=17),
        case(keys=17, causal=False),
        case(batch=1, seq=131, heads=(5, 5), width=40),
        *documents_cases(),
    ]


def documents(*lengths: int, **options: Any) -> Case:
    """One row of documents of such lengths; ``options`` as for ``case``."""
    return case("-".join(["documents", *map(str, lengths)]), 1, sum(lengths), **options)


def documents_cases() -> Sequence[Case]:
    """Lengths that are equal and that are not, of 1 and of odd numbers, with windows, softcap, sinks and layouts."""
    return [
        documents(7, 1, 12),
        documents(5, 5, 5),
        documents(13),
        documents(1, 1, 1, heads=(3, 1)),
        documents(2, 9, 3, window=4, heads=(6, 2)),
        documents(6, 6, window=4),
        documents(7, 3, softcap=3.0),
        documents(4, 4, softcap=3.0, window=3),
        documents(7, 3, sinks=True),
        documents(5, 5, sinks=True, window=2),
        documents(7, 3, sinks=True, softcap=3.0),
        *(
            documents(*lengths, layout=layout)
            for layout in ("heads", "fused", "strided")
            for lengths in ((7, 3), (5, 5))
        ),
        documents(7, 3, width=(24, 16)),
        documents(1, 40, 23, heads=(5, 5), width=40),
    ]


def _timing(batch: int, seq: int, heads: tuple[int, int], width: int, window: int | None = None) -> Timing:
    """Products of the scores that are seen: two forward, five backward, which computes the scores again."""
    reach = min(window or seq, seq)
    scores = batch * heads[0] * (seq * reach - reach * (reach - 1) // 2)
    rows = 2 * batch * seq * width
    forward_bytes = rows * 2 * (heads[0] + heads[1])
    return Timing(
        case("none", batch, seq, heads, width, window=window),
        forward_bytes,
        2 * forward_bytes + rows * heads[0],
        7 * 2 * scores * width,
    )


def timings() -> Sequence[Timing]:
    """Llama 8B's 32 heads over 8 of 128, with a window, and Gemma's of 256, at lengths whose scores fit into memory.

    Lengths up to 65,536, kernel by kernel: ``integration_tests/benchmarks/attention.py``.
    """
    return [
        _timing(2, 2048, (32, 8), 128),
        _timing(1, 4096, (32, 8), 128),
        _timing(1, 4096, (32, 8), 128, window=1024),
        _timing(2, 2048, (16, 8), 256),
    ]
