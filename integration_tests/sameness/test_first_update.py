"""The first update of adapters in bf16 has the effect that it has in float32.

After one step B is as small as the learning rate. Stock rounds the base's output to bf16 and then adds the adapter's
term, most of which is less than half a unit in the last place and is lost; here both are summed before the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_backend
from integration_tests.benchmarks.training.rows import start_adapters


def make_model(dtype: torch.dtype) -> Any:
    """A model whose weights are bf16's in every dtype, with adapters in float32 that do nothing yet."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_hidden_layers=3, **sizes)).to(torch.bfloat16).to(dtype)
    peft: Any = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    start_adapters(peft)
    return peft.train()


def improvement(model: Any, autocast: bool) -> float:
    """How much one step of AdamW lowers the loss of the tokens it was made for."""
    ids = torch.randint(3, 1000, (1, 192), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0] - losses[1]


def test_it_has_the_effect_that_it_has_in_float32() -> None:
    truth = improvement(make_model(torch.float32), autocast=False)
    stock = improvement(make_model(torch.bfloat16), autocast=True)
    mine = sloth_backend.optimize(make_model(torch.bfloat16), config={"print_report": False})
    ours = improvement(mine, autocast=True)
    assert abs(stock - truth) > 0.05 * truth, "stock has it too: this shows nothing"
    assert abs(ours - truth) < 0.03 * truth
