"""The calls that test and time ``ops/linear_cross_entropy.py``."""

from __future__ import annotations

from typing import Any

import torch

from sloth_kernels.cross_entropy_rows import BLOCK_V
from sloth_kernels.op import Call, Case, Timing


def _case(
    name: str,
    shape: tuple[int, int, int],
    *,
    ignored: float = 0.0,
    trained: str = "hw",
    bias: bool = False,
    **kwargs: Any,
) -> Case:
    """``trained`` names what needs a gradient: h(idden), w(eight), b(ias); hidden is a strided slice in every case."""

    def make(dtype: torch.dtype, device: torch.device) -> Call:
        n_tokens, n_hidden, n_vocab = shape
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int, std: float) -> torch.Tensor:
            return (torch.randn(*size, generator=generator, device=device) * std).to(dtype)

        hidden_TH = randn(n_tokens, n_hidden + 8, std=1.0)[:, :n_hidden]
        weight_VH = randn(n_vocab, n_hidden, std=2 * n_hidden**-0.5)
        labels_T = torch.randint(n_vocab, (n_tokens,), generator=generator, device=device)
        labels_T[torch.rand(n_tokens, generator=generator, device=device) < ignored] = kwargs.get("ignore_index", -100)
        bias_V = randn(n_vocab, std=1.0).requires_grad_("b" in trained) if bias else None
        args = (hidden_TH.requires_grad_("h" in trained), weight_VH.requires_grad_("w" in trained), labels_T, bias_V)
        return args, kwargs

    return Case(name, make)


def cases() -> list[Case]:
    """Odd sizes, single rows, several chunks, every epilogue, and each choice of what trains."""
    return [
        _case("odd", (36, 123, 507)),
        _case("small", (5, 64, 33)),
        _case("one_row", (1, 40, 129)),
        _case("frozen_head", (13, 64, 300), trained="h"),
        _case("head_alone", (13, 64, 300), trained="wb", bias=True),
        _case("ignored", (52, 123, 507), ignored=0.6, chunk_rows=8),
        _case("all_ignored", (9, 32, 65), ignored=1.1, trained="hwb", bias=True),
        _case("own_ignore_index", (20, 48, 97), ignored=0.3, ignore_index=0),
        _case("bias", (22, 48, 97), trained="hwb", bias=True, chunk_rows=10),
        _case("scale", (18, 48, 257), scale=0.0625),
        _case("softcap", (18, 48, 257), softcap=3.0, trained="h"),
        _case(
            "everything", (35, 72, 1031), ignored=0.2, trained="hwb", bias=True, scale=2.5, softcap=5.0, chunk_rows=12
        ),
        _case("several_blocks", (13, 32, 2 * BLOCK_V + 77), ignored=0.2, chunk_rows=4),
    ]


def timings() -> list[Timing]:
    """Llama 3's head, frozen and trained, and a long pass over a vocabulary of 32,000."""
    shapes = [
        ("frozen_head_128k", (4096, 4096, 128256), "h", 2),
        ("trained_head_128k", (4096, 4096, 128256), "hw", 3),
        ("frozen_head_32k_long", (16384, 4096, 32000), "h", 2),
    ]
    return [
        Timing(_case(name, (t, h, v), trained=trained), flops=products * 2 * t * h * v)
        for name, (t, h, v), trained, products in shapes
    ]
