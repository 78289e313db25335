"""Layer programs on a GPU: 16-bit numbers under every plan, peaks as predicted, budgets kept, memory that runs out."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_backend.plan as planning
from integration_tests.plugins.layer_programs.common import (
    MODES,
    Results,
    adapted,
    plans_of,
    quantised,
    reasons,
    switched_on,
    train,
)
from sloth_backend.budget import CONTEXT_BYTES, GIB, SPARE_SHARE
from sloth_backend.plan import Costs, MemoryPlan
from sloth_plugins.layer_programs import passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TOLERANCE = 1e-2
"""What the numbers rule allows beside stock's own distance, relative to a tensor's Frobenius norm in bfloat16."""
LAYERS, HIDDEN, ROWS, LENGTH = 8, 1024, 8, 1024
"""Where the plan matters: all that the layers could keep is several times the rest."""
STEPS = 8


def build(layers: int, hidden: int, vocabulary: int = 2048, **lora: Any) -> Any:
    """A random bf16 Llama over NF4 weights under LoRA, on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return adapted(quantised(model.cuda(), compute_dtype=torch.bfloat16), r=16, **lora).train()


def batch(rows: int, length: int, vocabulary: int = 2048, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


def in_float64(model: Any) -> Any:
    """The same values in float64, 4-bit weights too."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, LoraLayer) and isinstance(base := layer.get_base_layer(), bnb.nn.Linear4bit):
            packed: Any = base.weight
            dense = nn.Linear(base.in_features, base.out_features, bias=False)
            weight = dequantize_4bit(packed.data, packed.quant_state)
            dense.weight = nn.Parameter(weight, requires_grad=False)
            layer.base_layer = dense
    return twin.double()


def assert_numbers(ours: Results, stock: Results, truth: Results) -> None:
    """The numbers rule, for losses and gradients."""
    assert ours.keys() == stock.keys() == truth.keys()
    broken = {}
    for name, true in truth.items():
        mine, theirs = (((t[name].double() - true).norm() / true.norm()).item() for t in (ours, stock))
        if not mine <= theirs + TOLERANCE:
            broken[name] = mine, theirs
    assert not broken


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """The plans that passes followed since the test began, each once."""
    followed: list[MemoryPlan] = []
    original = passes.Passes.planned

    def noted(*args: Any) -> MemoryPlan:
        plan = original(*args)
        if not followed or followed[-1] is not plan:
            followed.append(plan)
        return plan

    monkeypatch.setattr(passes.Passes, "planned", noted)
    return followed


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    release()


def release() -> None:
    """Leave nothing of earlier models on the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_numbers(mode: str) -> None:
    model, batches = build(4, 512), [batch(2, 512)]
    stock, truth = train(copy.deepcopy(model), batches), train(in_float64(model), batches)
    mine = switched_on(model, memory=mode)
    assert not reasons(mine)
    assert_numbers(train(mine, batches), stock, truth)


def test_dropout_draws_the_same_masks_in_every_mode() -> None:
    """Masks are drawn again where values are computed again; a dense copy kept changes roundings alone."""
    batches, results = [batch(2, 512)], []
    for mode in ("fastest", "least"):
        model = switched_on(build(4, 512, lora_dropout=0.1), memory=mode)
        assert not reasons(model)
        results.append(train(model, batches))
    fastest, least = results
    for name in fastest:
        assert (fastest[name] - least[name]).norm() <= TOLERANCE * fastest[name].norm(), name


@pytest.mark.parametrize("which", [0, -1], ids=["all_kept", "nothing_kept"])
def test_offloaded_inputs_come_back_right(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a plan that offloads every layer's input, three times over: host memory is used again."""

    def offload(costs: Costs, *rest: Any) -> MemoryPlan:
        return MemoryPlan(tuple([level for level in levels if level.offloaded][which] for levels in costs.layers))

    model, batches = build(4, 512), [batch(4, 512, seed=seed) for seed in range(3)]
    stock, truth = train(copy.deepcopy(model), batches), train(in_float64(model), batches)
    monkeypatch.setattr(planning, "choose", offload)
    mine = switched_on(model)
    assert_numbers(train(mine, batches), stock, truth)


def test_offloaded_inputs_are_gone_between_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that autograd or the ring still holds: the first, over frozen embeddings, and the last."""

    def least(costs: Costs, *rest: Any) -> MemoryPlan:
        levels = [sorted(levels, key=lambda level: len(level.kept)) for levels in costs.layers]
        return MemoryPlan(tuple(next(lv for lv in own if bool(lv.offloaded) == offloads) for own in levels))

    held = {}
    monkeypatch.setattr(planning, "choose", least)
    for offloads in (False, True):
        model, inputs = switched_on(build(LAYERS, 512)), batch(8, 512)
        train(model, [inputs])
        before = torch.cuda.memory_allocated()
        loss = model(**inputs).loss
        torch.cuda.synchronize()
        held[offloads] = torch.cuda.memory_allocated() - before
        del model, loss
        release()
    assert held[False] - held[True] >= (LAYERS - 3) * 8 * 512 * 512 * 2


# Memory ---------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a short training run took."""

    measured: int
    """Bytes: the most that was allocated."""
    losses: torch.Tensor
    warnings: list[str]


def run_for_steps(steps: int = STEPS, **config: Any) -> Outcome:
    """Train the larger model with AdamW; earlier models' memory is given back first."""
    release()
    model = switched_on(build(LAYERS, HIDDEN, 32000), **config)
    assert not reasons(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for seed in range(steps):
        loss = model(**batch(ROWS, LENGTH, 32000, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    warned = [finding.reason for finding in plans_of(model) if finding.action == "warned"]
    return Outcome(torch.cuda.max_memory_allocated(), torch.stack(losses).float().cpu(), warned)


def budget_gb(size: int) -> float:
    """The ``vram_budget_gb`` under which a plan may take ``size`` bytes."""
    return (size / (1 - SPARE_SHARE) + CONTEXT_BYTES) / GIB


def two_ends(chosen: list[MemoryPlan]) -> tuple[int, int]:
    """The predicted peaks of the least plan and of the fastest, in bytes."""
    for mode in ("least", "fastest"):
        run_for_steps(1, memory=mode)
    least, fastest = (plan.predicted_peak_bytes for plan in chosen)
    chosen.clear()
    assert fastest > 2 * least, "the plan does not matter at these sizes"
    return least, fastest


@pytest.mark.parametrize("mode", ["least", "fastest"])
def test_the_peak_is_predicted(mode: str, chosen: list[MemoryPlan]) -> None:
    outcome = run_for_steps(memory=mode)
    (plan,) = chosen
    assert plan.predicted_peak_bytes == pytest.approx(outcome.measured, rel=0.1), str(plan)
    assert not [reason for reason in outcome.warnings if "out of memory" in reason]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85])
def test_a_budget_is_kept_and_used(share: float, chosen: list[MemoryPlan]) -> None:
    """Between the least plan and the fastest: never over, and not far below."""
    least, fastest = two_ends(chosen)
    room = int(least + share * (fastest - least))
    outcome = run_for_steps(vram_budget_gb=budget_gb(room))
    (plan,) = chosen
    assert plan.fits
    assert outcome.measured <= room / (1 - SPARE_SHARE)
    assert plan.predicted_peak_bytes == pytest.approx(outcome.measured, rel=0.1), str(plan)
    assert plan.predicted_peak_bytes > room - (fastest - least) / 4


def test_running_out_of_memory_is_survived(chosen: list[MemoryPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts on memory that is not there: half-way between the least plan and the fastest it ends."""
    least, fastest = two_ends(chosen)
    stock = run_for_steps(memory="least")
    chosen.clear()
    monkeypatch.setattr(passes, "device_budget", lambda *args: 1 << 50)
    limit = (least + fastest) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    outcome = run_for_steps(memory="auto")
    assert chosen[0].predicted_peak_bytes == pytest.approx(fastest, rel=0.02)
    assert chosen[-1].predicted_peak_bytes < chosen[0].predicted_peak_bytes
    assert any(reason.startswith("out of memory") for reason in outcome.warnings)
    assert outcome.measured <= limit
    torch.testing.assert_close(outcome.losses, stock.losses, rtol=TOLERANCE, atol=0)


def test_a_prediction_that_is_too_small_is_survived(chosen: list[MemoryPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level claims a third of the bytes that it holds."""
    least, fastest = two_ends(chosen)
    original = planning.choose

    def misled(costs: Costs, *rest: Any) -> MemoryPlan:
        shrunk = {
            id(levels): tuple(replace(level, device_bytes=level.device_bytes // 3) for level in levels)
            for levels in costs.layers
        }
        return original(replace(costs, layers=tuple(shrunk[id(levels)] for levels in costs.layers)), *rest)

    monkeypatch.setattr(planning, "choose", misled)
    limit = (least + fastest) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    outcome = run_for_steps(memory="auto")
    assert any(reason.startswith("out of memory") for reason in outcome.warnings)
    assert outcome.losses.isfinite().all()
