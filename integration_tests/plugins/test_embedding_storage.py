"""Untrained rows wherever they are stored, those that texts reach, the padding row, and a run that they would ruin."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sloth_backend
from integration_tests import child, tiny
from integration_tests.hosts.trl_runs import make_args, make_trainer
from integration_tests.plugins.test_embedding_fix import ROWS, VOCAB, make_model, repair, true_mean
from sloth_backend import SlothConfig, autoload
from sloth_backend.findings import Edits
from sloth_backend.run import Run
from sloth_plugins.embedding_fix import sloth_fix_embeddings

autoload.install()


def assert_mean(weight: torch.Tensor, before: torch.Tensor, rows: list[int], tolerance: float) -> None:
    """Rows hold the mean of the others, of what is stored, within ``tolerance``; the others are as they were."""
    kept = [i for i in range(len(weight)) if i not in rows]
    assert torch.equal(weight[kept], before[kept])
    assert (weight[rows].double() - true_mean(before, rows)).abs().max() <= tolerance


def eight_bit(values: torch.Tensor) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A parameter as bitsandbytes keeps it, and what it stands for now."""
    weight: Any = bnb.nn.Int8Params(values.half(), requires_grad=False).to("cpu")
    if weight.SCB is None:
        weight.data, weight.SCB, _ = bnb.functional.int8_vectorwise_quant(values.half())
    return weight, lambda: weight.data.float() * weight.SCB[:, None] / 127


def four_bit(values: torch.Tensor, nested: bool = False) -> tuple[Any, Callable[[], torch.Tensor]]:
    options: Any = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": nested}
    weight: Any = bnb.nn.Params4bit(values, **options).to("cpu")
    return weight, lambda: bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


@pytest.mark.parametrize(("quantise", "error"), [(eight_bit, 1 / 254), (four_bit, 0.16)])
def test_quantised_rows_get_the_mean_rounded_as_the_others_are(quantise: Any, error: float) -> None:
    values = torch.randn(VOCAB, 128, generator=torch.Generator().manual_seed(0))
    values[:, 0] += 1
    values[ROWS] *= 1e-23
    weight, now = quantise(values)
    before, edits = now(), Edits()
    model: Any = make_model()
    model.lm_head.weight = weight
    finding = repair(model, edits)[1]
    assert (finding.action, f"{len(ROWS)} of {VOCAB} rows" in finding.reason) == ("changed", True), finding.reason
    assert_mean(now(), before, ROWS, error * float(true_mean(before, ROWS).abs().max()) + 1e-6)
    assert repair(model)[1].action == "skipped"
    edits.rollback()
    assert torch.equal(now(), before)


def test_double_quantised_rows_are_left_alone() -> None:
    model: Any = make_model()
    model.lm_head.weight, _ = four_bit(torch.randn(VOCAB, 128), nested=True)
    finding = repair(model)[1]
    assert finding.action == "skipped"
    assert "double quantisation" in finding.reason


@pytest.mark.parametrize("way", ["rows", "columns", "whole"])
def test_a_sharded_matrix_is_fixed_where_it_lies(way: str, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_sharded(way)
    finally:
        dist.destroy_process_group()


def check_sharded(way: str) -> None:
    """What each rank of a group does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placement = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}[way]
    model: Any = make_model()
    edits, before = Edits(), model.lm_head.weight.data.clone()
    model.lm_head.weight = nn.Parameter(distribute_tensor(before.clone(), mesh, [placement]))
    finding = repair(model, edits)[1]
    assert (finding.action, f"{len(ROWS)} of {VOCAB} rows" in finding.reason) == ("changed", True), finding.reason
    assert_mean(model.lm_head.weight.data.full_tensor(), before, ROWS, 1e-7)
    assert repair(model)[1].action == "skipped"
    edits.rollback()
    assert torch.equal(model.lm_head.weight.data.full_tensor(), before)
    with torch.no_grad():
        model.lm_head.weight.data.to_local()[0, -1] = float("nan")
    assert repair(model)[1].action == "warned"


RANK = """
import sys
import torch.distributed as dist
from integration_tests.plugins.test_embedding_storage import check_sharded
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
for way in ("rows", "columns", "whole"):
    check_sharded(way)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_come_to_the_same_rows(tmp_path: Path) -> None:
    done = child.fork(*(child.Start(RANK, (rank, tmp_path / "store")) for rank in range(2)))
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stderr[-3000:] for process in done)


def test_rows_that_texts_reach_are_named() -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer, vocab_size=len(tokenizer) + 8)
    used, plain, beyond = tokenizer.convert_tokens_to_ids("<|im_start|>"), 40, len(tokenizer) + 3

    def story(*rows: Any) -> str:
        with torch.no_grad():
            model.lm_head.weight[list(rows)] = 1e-23
        run = Run("user", SlothConfig())
        return (sloth_fix_embeddings(model, tokenizer, run, Edits()) or [])[1].reason.partition("trained ones")[2]

    assert story(used, plain, beyond) == (
        "; 2 of them are tokens that a text can hold, and every chat would: '<|im_start|>'"
    )
    assert story(plain) == "; 1 of them are tokens that a text can hold, none is used by the chat template"
    assert story(beyond) == "; no text reaches them: none is a token of the tokenizer"


@pytest.mark.parametrize("value", [0.0, 1e-23])
def test_a_run_that_would_end_in_nan_trains(value: float, tmp_path: Path) -> None:
    """The template writes tokens without a trained row, and the norms' epsilon is below what float32 can square."""

    def norms(**switch: Any) -> list[float]:
        tokenizer = tiny.make_tokenizer()
        model = tiny.make_model(tokenizer, rms_norm_eps=0.0, pad_token_id=None)
        rows = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        model.model.embed_tokens.weight.data[rows] = value
        args = make_args(tmp_path, max_steps=2)
        trainer = make_trainer(tmp_path, "messages", model, args, processing_class=tokenizer, **switch)
        trainer.train()
        return [float(log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]

    assert not all(map(math.isfinite, norms()))
    repaired = norms(backend={"print_report": False})
    assert len(repaired) == 2
    assert all(map(math.isfinite, repaired))


def test_the_padding_row_moves_with_pad_before_rows_are_fixed() -> None:
    tokenizer = tiny.make_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model: Any = tiny.make_model(tokenizer, pad_token_id=tokenizer.eos_token_id)
    embedding = model.model.embed_tokens
    assert embedding.padding_idx == eos
    assert not embedding.weight[eos].any()
    sloth_backend.optimize(model, tokenizer, {"print_report": False, "kernels": False})
    assert embedding.padding_idx == model.config.pad_token_id == pad
    assert embedding.weight[eos].any()  # untrained, and no longer the row that is left alone
    ids = torch.tensor([[5, eos, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert embedding.weight.grad[eos].any()
    sloth_backend.undo(model)
    assert embedding.padding_idx == eos
