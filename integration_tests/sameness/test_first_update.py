"""The first update of adapters in bf16 has the effect that it has in float32.

After one step B is as small as the learning rate. Stock rounds the base's output to bf16 and then adds the adapter's
term, most of which is less than half a unit in the last place and is lost; here both are summed before the rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import sloth_backend
from integration_tests.benchmarks.training.rows import start_adapters
from integration_tests.plugins.layer_programs.common import quantised


def make_model(dtype: torch.dtype, in_4bit: bool) -> Any:
    """A model whose weights are bf16's in every dtype, with adapters in float32 that do nothing yet; with biases where
    its weights are dense."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, num_hidden_layers=3, **sizes)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    if in_4bit:
        model = quantised(model, compute_dtype=dtype)
    peft: Any = get_peft_model(model.to(dtype), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
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


@pytest.mark.parametrize("memory", ["least", "fastest"])
@pytest.mark.parametrize("in_4bit", [False, True])
def test_it_has_the_effect_that_it_has_in_float32(in_4bit: bool, memory: str) -> None:
    """Where nothing is kept, and where dense copies of 4-bit weights are."""
    truth = improvement(make_model(torch.float32, in_4bit), autocast=False)
    stock = improvement(make_model(torch.bfloat16, in_4bit), autocast=True)
    model = make_model(torch.bfloat16, in_4bit)
    mine = sloth_backend.optimize(model, config={"print_report": False, "memory": memory})
    ours = improvement(mine, autocast=True)
    assert abs(stock - truth) > 0.1 * truth, "stock has it too: this shows nothing"
    assert abs(ours - truth) < 0.05 * truth
