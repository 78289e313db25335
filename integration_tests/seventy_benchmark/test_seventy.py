"""The benchmark of a 70B model: what it builds, its rule for losses, and both contenders in its size for a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from integration_tests.benchmarks.seventy import __main__ as seventy
from integration_tests.benchmarks.seventy import model, report


def test_the_shape_has_seventy_billion_parameters() -> None:
    of = model.shape()
    kv = of.hidden * of.kv_heads // of.heads
    layer = 2 * of.hidden * (of.hidden + kv) + 3 * of.hidden * of.intermediate + 2 * of.hidden
    assert of.layers * layer + 2 * of.vocab * of.hidden + of.hidden == 70_553_706_496
    assert of.config().head_dim == 128


def test_what_is_built_is_quantised_and_the_same_each_time() -> None:
    of, cpu = model.shape(tiny=True, layers=3), torch.device("cpu")
    built = model.build(of, cpu)
    assert len(built.model.layers) == 3
    linear = built.model.layers[2].mlp.down_proj
    assert linear.weight.dtype == torch.bfloat16
    assert linear.quant_state.nested
    dense = dequantize_4bit(linear.weight.data, linear.quant_state)
    assert dense.shape == (of.hidden, of.intermediate)
    assert dense.float().std().item() == pytest.approx(model.STD, rel=0.05)
    assert model.parameters(built) == sum(p.numel() for p in _plain(of).parameters())
    assert model.checksum(built) == model.checksum(model.build(of, cpu))
    assert model.checksum(built) != model.checksum(model.build(of, cpu, seed=1))
    exact = model.build(of, cpu, dtype=torch.float32)
    assert model.checksum(exact) == model.checksum(built)
    assert torch.equal(exact.lm_head.weight, built.lm_head.weight.float())
    assert exact.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def _plain(of: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(of.config())


def result(contender: str, *losses: float) -> dict[str, Any]:
    return {"contender": contender, "losses": list(losses)}


def test_without_float32_losses_are_judged_by_the_largest_relative_difference() -> None:
    stock, near, far = result("stock", 10.0, 8.0), result("sloth", 10.004, 8.0), result("sloth-least", 10.0, 8.008)
    found = report.judged([stock, near, far])
    assert [r["distance"] for r in found] == [None, pytest.approx(4e-4), pytest.approx(1e-3)]
    assert [r["agrees"] for r in found] == [True, True, False]
    assert report.agrees(found[:2])
    assert not report.agrees(found)
    assert not report.agrees(report.judged([stock, result("sloth", 10.0)]))
    assert not report.agrees(report.judged([stock, result("sloth", 10.0, float("nan"))]))


@pytest.mark.parametrize(
    ("losses", "agrees"),
    [
        ((10.0, 7.9, 7.82), True),
        ((10.0, 7.96, 7.92), True),  # between stock and float32
        ((10.0, 8.05, 7.92), False),  # as near to stock as float32 is, on its other side
        ((10.0, 7.85, 7.8), False),  # past float32
        ((10.1, 7.9, 7.82), False),  # in the first step, where stock has not moved away yet
        ((10.0, 7.9), False),
    ],
)
def test_stocks_distance_to_float32_is_what_is_allowed(losses: tuple[float, ...], agrees: bool) -> None:
    stock, truth = result("stock", 10.0, 8.0, 7.92), result("stock-fp32", 10.0, 7.9, 7.82)
    assert report.bounds(stock, truth) == pytest.approx([5e-4, 5e-4 + 0.0125, 5e-4 + 0.0126], abs=1e-4)
    found = report.judged([stock, result("sloth", *losses), truth])
    assert report.agrees(found) is agrees
    assert [r["from_truth"] for r in found][::2] == [pytest.approx(0.0126, abs=1e-4), None]


def test_float32_that_broke_allows_nothing() -> None:
    stock, truth = result("stock", 10.0, 8.0), result("stock-fp32", 10.0, float("nan"))
    assert report.bounds(stock, truth) == [report.FLOOR] * 2
    assert not report.agrees(report.judged([stock, result("sloth", 10.0, 8.0), truth]))


def test_there_is_no_page_of_what_was_not_measured() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        report.page([])


def test_contenders_train_alike(tmp_path: Path) -> None:
    """Two processes each, under torchrun, as on GPUs."""
    page = tmp_path / "seventy.md"
    sizes = ["--tiny", "--rank", "8", "--length", "64", "--accumulation", "2", "--steps", "2", "--page", str(page)]
    assert seventy.main(["--out", str(tmp_path), *sizes]) == 0
    stock, ours, truth = json.loads((tmp_path / report.FILE).read_text())
    assert stock["losses"] != ours["losses"]
    assert stock["losses"][0] != stock["losses"][1]
    assert truth["losses"] == pytest.approx(stock["losses"], rel=1e-3)
    assert truth["losses"] != stock["losses"]
    assert ours["agrees"]
    assert ours["distance"] <= ours["allowed"] < 2 * report.FLOOR
    assert ours["layers_changed"] == 2
    assert ours["plan"][0].startswith("layers: 2")
    assert [len(r["ranks"]) for r in (stock, ours, truth)] == [2, 2, 2]
    assert "| sloth_backend |" in page.read_text()
    assert page.read_text().count("the same in float32") == 1
    assert "2 of 2 layers as programs" in page.read_text()


def test_a_contender_that_fails_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seventy, "PACKAGE", "integration_tests.benchmarks.seventy.nothing")
    with pytest.raises(RuntimeError, match="stock ended with 1; its output"):
        seventy.main(["--out", str(tmp_path), "--tiny", "--contenders", "stock", "--gpus", "1"])
    assert report.load(tmp_path) == []
