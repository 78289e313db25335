"""What only a GPU shows of linear_cross_entropy: memory at Llama 3's size, no synchronising call, 64-bit offsets."""

from __future__ import annotations

import pytest
import torch

from sloth_kernels.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def make(n_tokens: int, n_hidden: int, n_vocab: int, *, trained: str = "hw") -> tuple[torch.Tensor, ...]:
    """hidden, weight and labels in bfloat16, the ``trained`` ones with a gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n_tokens, n_hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
    weight = torch.randn(n_vocab, n_hidden, device="cuda", dtype=torch.bfloat16, generator=generator) / n_hidden**0.5
    labels = torch.randint(n_vocab, (n_tokens,), device="cuda", generator=generator)
    return hidden.requires_grad_("h" in trained), weight.requires_grad_("w" in trained), labels


@pytest.mark.parametrize(("trained", "bytes_per_weight"), [("h", 0), ("hw", 6)])
def test_memory_at_the_size_of_llama_3(trained: str, bytes_per_weight: int) -> None:
    """Forward and backward take less than 1 GiB, and for a head that trains dW in float32 and in bfloat16."""
    hidden, weight, labels = make(4096, 4096, 128256, trained=trained)
    linear_cross_entropy(hidden[:8], weight.detach(), labels[:8])  # cuBLAS's workspace is not the op's
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).loss_sum.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30 + bytes_per_weight * weight.numel()


def test_no_synchronising_call() -> None:
    """The number of labelled rows comes by an event of its own; nothing else is asked for, in the backward either."""
    hidden, weight, labels = make(64, 64, 1000)
    labels[::3] = -100
    linear_cross_entropy(hidden, weight, labels).loss_sum.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear_cross_entropy(hidden, weight, labels, chunk_rows=16).loss_sum / 40).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_beyond_two_to_the_31_logits() -> None:
    """20,000 rows of 128,256 logits in one chunk: the last row starts beyond what 32 bits address."""
    hidden, weight, labels = make(20_000, 64, 128256, trained="h")
    whole, split = (linear_cross_entropy(hidden, weight, labels, chunk_rows=rows) for rows in (20_000, 1_000))
    torch.testing.assert_close(whole.loss_sum, split.loss_sum)
    torch.testing.assert_close(whole.entropy_sum, split.entropy_sum)
    grads = [torch.autograd.grad(sums.loss_sum, [hidden])[0][-256:] for sums in (whole, split)]
    torch.testing.assert_close(*grads)
