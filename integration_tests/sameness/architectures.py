"""Tiny random causal LMs of real architectures, each with what makes it special switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SPECIALS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi3": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": False},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "olmo2": {},
}
"""``ernie4_5`` is the architecture that no other backend names: GLM-style rotary pairs, biases everywhere."""

FUSED_LOSS = frozenset(SPECIALS)


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random model of architecture ``name``; weights are drawn in float32, so every dtype starts from the same."""
    torch.manual_seed(seed)
    options = {**COMMON, **SPECIALS[name], **overrides}
    config = AutoConfig.for_model(name, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.to(dtype)


def make_batches(steps: int = 3, rows: int = 2, length: int = 17, vocab: int = 99, seed: int = 0) -> list[Any]:
    """Padded batches with ignored prompts: dictionaries of input_ids, attention_mask and labels, (rows, length)."""
    source = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        ids = torch.randint(3, vocab, (rows, length), generator=source)
        mask = torch.ones_like(ids)
        mask[-1, length - 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, :5] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches
