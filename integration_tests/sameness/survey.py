"""Every causal LM that transformers knows, tiny and random: which paths does each get, and is its loss the same?

usage: survey.py [--out FOLDER] [--only NAME ...]

Prints one line an architecture and writes ``architectures.json`` and ``architectures.md`` into FOLDER. An architecture
that cannot be made this small, or that is no plain decoder, is listed with the reason. Losses and gradients are
compared in float32 with the model's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import resource
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sloth_backend

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "rotary_dim": 8,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MEMORY = 12 * 2**30
"""Bytes the process may hold: a model that grows beyond is one more that cannot be made small."""
LIMIT = 30_000_000
"""Parameters beyond which an architecture counts as one that cannot be made small by these names."""


def make(name: str) -> Any:
    """A tiny model of architecture ``name``, or an exception that says why not."""
    known = AutoConfig.for_model(name)
    options = {key: value for key, value in TINY.items() if hasattr(known, key)}
    config = AutoConfig.for_model(name, **options)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LIMIT:
        raise ValueError(f"{size:,} parameters with the usual names of sizes")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one fixed batch, in evaluation-free training mode without randomness."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def survey(name: str) -> dict[str, Any]:
    """What one architecture gets, and how far loss and gradients are from its own."""
    try:
        model = make(name)
        stock, stock_gradients = run(copy.deepcopy(model))
    except Exception as error:
        return {"name": name, "made": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    try:
        sloth_backend.optimize(model, config={"print_report": False})
        loss, gradients = run(model)
    except Exception as error:
        return {"name": name, "made": True, "failed": f"{type(error).__name__}: {error}"[:300]}
    findings = sloth_backend.report(model).findings
    scale = max(float(g.abs().max()) for g in stock_gradients.values())
    return {
        "name": name,
        "made": True,
        "changed": dict(Counter(f.capability for f in findings if f.action == "changed")),
        "skipped": sorted({f"{f.capability}: {f.reason}" for f in findings if f.action == "skipped"}),
        "loss_difference": abs(float(loss - stock)),
        "gradient_difference": max(float((gradients[n] - g).abs().max()) / scale for n, g in stock_gradients.items()),
    }


def line(row: dict[str, Any]) -> str:
    if not row["made"]:
        return f"{row['name']:28} not made: {row['reason']}"
    if "failed" in row:
        return f"{row['name']:28} FAILED: {row['failed']}"
    changed = " ".join(f"{k}:{v}" for k, v in row["changed"].items())
    return f"{row['name']:28} loss {row['loss_difference']:.1e} grad {row['gradient_difference']:.1e}  {changed}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the architectures that ran, and the list of those that did not."""
    ran = [row for row in rows if row["made"]]
    names = ("linear_cross_entropy", "rope", "rms_norm", "glu")
    counts = ", ".join(f"{name} {sum(name in row.get('changed', {}) for row in ran)}" for name in names)
    lines = [
        "# Architectures",
        "",
        "Every causal LM that transformers knows, made tiny and random, one step with the backend and one without, in",
        "float32 on a CPU: `python integration_tests/sameness/survey.py --out docs/benchmarks`. Numbers are modules",
        "changed; differences are against the model's own loss, and against its largest gradient entry.",
        "",
        f"{len(ran)} of {len(rows)} could be made this small; with {counts}. torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        "| architecture | loss | rope | rms_norm | glu | loss difference | gradient difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ran:
        cells = " | ".join(str(row["changed"].get(name, "")) for name in names)
        lines.append(f"| {row['name']} | {cells} | {row['loss_difference']:.1e} | {row['gradient_difference']:.1e} |")
    rest = [f"`{row['name']}`" for row in rows if not row["made"]]
    return "\n".join([*lines, "", "Not made this small by the usual names of sizes: " + ", ".join(rest) + ".", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows.append(survey(name))
        print(line(rows[-1]), flush=True)
    if arguments.out:
        (arguments.out / "architectures.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}))
        (arguments.out / "architectures.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
