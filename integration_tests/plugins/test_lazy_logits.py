"""What hosts do to the outputs of a forward does not compute logits that nobody looks at."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from sloth_plugins.kernel_patching.lazy_logits import LazyLogits, Product


def outputs_of(dtype: torch.dtype = torch.float32) -> tuple[LazyLogits, torch.Tensor]:
    """Logits that were put off, beside a loss, and those of stock."""
    tokenizer = tiny.make_tokenizer()
    ids = torch.arange(3, 15).view(2, 6)
    stock = tiny.make_model(tokenizer).to(dtype)(input_ids=ids, labels=ids).logits
    model = sloth_backend.optimize(tiny.make_model(tokenizer).to(dtype), config={"print_report": False})
    logits = model(input_ids=ids, labels=ids).logits
    assert isinstance(logits, LazyLogits)
    return logits, stock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_of_outputs_leaves_them_put_off(dtype: torch.dtype) -> None:
    """As FSDP2 casts what a model returns, in training where nobody may be there to compute them."""
    logits, stock = outputs_of()
    assert torch.is_floating_point(logits)
    cast = logits.to(dtype)
    assert isinstance(cast, LazyLogits)
    assert cast.dtype == dtype
    assert not cast.is_computed()
    assert not logits.is_computed()
    torch.testing.assert_close(cast + 0, stock.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_a_cast_that_loses_something_counts_in_a_loss_that_is_to_come() -> None:
    head = torch.nn.Linear(4, 8, bias=False)
    hidden = torch.randn(2, 4)
    logits = LazyLogits(Product(head, head.forward, hidden, None), torch.float32)
    assert isinstance(logits.to(torch.float64), LazyLogits)
    for to in (torch.bfloat16, torch.int64, "cpu"):
        assert not isinstance(logits.to(to), LazyLogits)
        logits = LazyLogits(logits.product, torch.float32)


def test_an_adapter_that_is_put_around_the_head_afterwards_is_heard_of() -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny.make_tokenizer()
    ids = torch.arange(3, 15).view(2, 6)
    options = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    losses = []
    for backend in (False, True):
        model = tiny.make_model(tokenizer, tie_word_embeddings=False)
        if backend:
            model = sloth_backend.optimize(model, config={"print_report": False})
        torch.manual_seed(0)
        model = get_peft_model(model, options)
        with pytest.warns(RuntimeWarning, match="before the loss.*an adapter") if backend else nullcontext():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
