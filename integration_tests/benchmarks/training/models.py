"""Random-weight models of named shapes, written as checkpoints that ``from_pretrained`` loads, each with a tokenizer.

Speed and memory depend on shapes, not on what the weights have learnt, so nothing is downloaded. The weights are drawn
on the GPU where there is one; an NF4 model is quantised there too (double-quantised, blocks of 64, bf16 compute),
module by module while it is loaded.

usage: python -m integration_tests.benchmarks.training.models NAME FOLDER [--bf16] [--tiny]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHARD = "4GB"


@dataclass(frozen=True)
class Shape:
    """An architecture of transformers and the fields of its config that set its size."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    others: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The model's config."""
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
        }
        return AutoConfig.for_model(self.architecture, **{**sizes, **TOKEN_IDS, **self.others})

    def tiny(self) -> Shape:
        """The same architecture in two layers, for a run on a CPU."""
        others = {**self.others, **({"head_dim": 16} if "head_dim" in self.others else {})}
        return Shape(self.architecture, 64, 128, 2, 4, 2, 512, others)


LLAMA = {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE}
GEMMA2 = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True}
SHAPES = {
    "llama-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256, LLAMA),
    "llama-1b": Shape("llama", 2048, 8192, 16, 32, 8, 128256, {**LLAMA, "tie_word_embeddings": True}),
    "mistral-7b": Shape("mistral", 4096, 14336, 32, 32, 8, 32768, {"sliding_window": None}),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, {"rms_norm_eps": 1e-6}),
    "gemma-2-9b": Shape("gemma2", 3584, 14336, 42, 16, 8, 256000, GEMMA2),
}
"""Llama 3.1 8B, Llama 3.2 1B, Mistral 7B v0.3, Qwen2.5 7B and Gemma 2 9B."""


def shape(name: str, tiny: bool = False) -> Shape:
    """The shape called ``name``, or its tiny sibling.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name].tiny() if tiny else SHAPES[name]


def folder_name(name: str, nf4: bool, tiny: bool) -> str:
    """``llama-8b-nf4``, ``llama-1b-bf16-tiny``: the folder of a model among others."""
    return f"{name}-{'nf4' if nf4 else 'bf16'}{'-tiny' if tiny else ''}"


def is_written(folder: Path) -> bool:
    """Whether ``write`` has finished there: the tokenizer comes last."""
    return (folder / "tokenizer.json").exists()


def write(name: str, folder: Path, nf4: bool, tiny: bool = False) -> Path:
    """Write the model and its tokenizer to ``folder``; returns it."""
    torch.manual_seed(0)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape(name, tiny).config(), dtype=torch.bfloat16)
    if nf4:
        model = quantise(model, device)
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer().save_pretrained(folder)
    return folder


def quantise(model: Any, device: str) -> Any:
    """A copy of ``model`` whose linear layers, but for the head, are NF4 on ``device``."""
    weights = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", {}):
        weights.pop(tied, None)
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=weights,
        quantization_config=nf4_config(),
        dtype=torch.bfloat16,
        device_map={"": device},
    )


def nf4_config(compute: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation: QLoRA's base."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte. The workloads are token ids already; hosts only ask for the special tokens."""
    specials = ["<|pad|>", "<|bos|>", "<|eos|>"]
    letters = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    )


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bf16", action="store_true", help="not quantised")
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a CPU")
    options = parser.parse_args()
    write(options.name, options.folder, not options.bf16, options.tiny)


if __name__ == "__main__":
    main()
