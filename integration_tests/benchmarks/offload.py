"""What offloaded checkpointing costs and saves: seconds a step and peak device memory, host against offload.

A random bf16 Llama with a frozen base (its norms alone train, so backward is LoRA's) takes steps of one row of random
tokens. Prints one JSON object; needs a CUDA GPU.

usage: python integration_tests/benchmarks/offload.py [--tokens 8192,32768] [--layers 16] [--hidden 4096] [--reentrant]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins.offloaded_checkpointing as plugin
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits
from sloth_backend.run import Run

GIB = 2**30


def main() -> None:
    """Measure every length in both modes and print the result."""
    options = parse_options()
    model = make_model(options)
    model.gradient_checkpointing_enable({"use_reentrant": options.reentrant})
    lengths = [int(length) for length in options.tokens.split(",")]
    print(json.dumps({**describe(options), "results": [compare(model, length, options.steps) for length in lengths]}))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,32768", help="row lengths, separated by commas")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each mode; the median counts")
    parser.add_argument("--reentrant", action="store_true", help="checkpoint with use_reentrant=True")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> Any:
    """The model, on the GPU, ready to train its norms."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=1 << 20,
    )
    with torch.device("cuda:0"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model.train()


def compare(model: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Both modes at one length, host first and once more at the end, so that a drifting clock shows."""
    host = measure(model, tokens, steps)
    run, edits = Run("user", SlothConfig(), torch.device("cuda:0")), Edits()
    plugin.sloth_patch_model(model, run, None, edits)
    offload = measure(model, tokens, steps)
    edits.rollback()
    again = measure(model, tokens, steps)
    seconds = statistics.mean([host["seconds"], again["seconds"]])
    return {
        "tokens": tokens,
        "host": host,
        "offload": offload,
        "host_again": again,
        "overhead_percent": round(100 * (offload["seconds"] / seconds - 1), 2),
        "saved_gib": round(host["peak_gib"] - offload["peak_gib"], 3),
    }


def measure(model: Any, tokens: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, seconds of the first one (which pins host memory), peak GiB on the device, host GiB."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda:0")
    first = step_seconds(model, ids)
    torch.cuda.reset_peak_memory_stats()
    seconds = [step_seconds(model, ids) for _ in range(steps)]
    return {
        "seconds": round(statistics.median(seconds), 4),
        "fastest": round(min(seconds), 4),
        "first_step_seconds": round(first, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "host_gib": round(plugin.host_bytes(model) / GIB, 3),
    }


def step_seconds(model: Any, ids: torch.Tensor) -> float:
    """One forward and backward, the device idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the options."""
    return {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": vars(options),
    }


if __name__ == "__main__":
    main()
