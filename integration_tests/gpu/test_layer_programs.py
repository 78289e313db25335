"""Layer programs on a GPU: 16-bit numbers under every plan, peaks as predicted, budgets kept, memory that runs out."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_backend
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
from sloth_kernels import glu_contractions
from sloth_plugins.layer_programs import planner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TOLERANCE = 1e-2
"""What the numbers rule allows beside stock's own distance, relative to a tensor's Frobenius norm in bfloat16."""
LAYERS, HIDDEN, VOCABULARY, ROWS, LENGTH = 16, 1024, 32000, 8, 1024
"""Where the plan matters: all that the layers could keep is several times the rest, and one layer's share of it, or an
input under way to the host, is little."""
STEPS = 4
"""The optimizer's state is there from the second on."""


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
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        quantised(model, compute_dtype=torch.bfloat16)
    return adapted(model, r=16, **lora).train()


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


class Small(NamedTuple):
    """A model, what it is trained on, and what stock and float64 make of it."""

    model: Any
    batches: list[dict[str, torch.Tensor]]
    stock: Results
    truth: Results


@pytest.fixture(scope="module")
def small() -> Small:
    model, batches = build(4, 512), [batch(4, 512, seed=seed) for seed in range(3)]
    stock, truth = train(copy.deepcopy(model), batches), train(in_float64(model), batches)
    return Small(model, batches, stock, truth)


def assert_right(small: Small, **config: Any) -> None:
    """The numbers rule, all layers being programs."""
    mine = switched_on(copy.deepcopy(small.model), **config)
    assert not reasons(mine)
    assert_numbers(train(mine, small.batches), small.stock, small.truth)


@pytest.mark.parametrize("mode", MODES)
def test_numbers(mode: str, small: Small) -> None:
    assert_right(small, memory=mode)


def under_autocast(model: Any, batches: list[dict[str, torch.Tensor]]) -> Results:
    """Trained in bf16, as trainers do: a weight and its adapters are one product where a dense copy is kept."""
    with torch.autocast("cuda", torch.bfloat16):
        return train(model, batches)


@pytest.mark.parametrize("cached", [0, 2, 4])
def test_numbers_where_some_layers_keep_dense_weights(
    cached: int, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with and without them take other ways to the same numbers, in one process with stock."""

    def some(costs: Costs, *rest: Any) -> MemoryPlan:
        return MemoryPlan(tuple(levels[0] for levels in costs.layers), cached_layers=cached)

    choose_by(some, monkeypatch)
    stock = under_autocast(copy.deepcopy(small.model), small.batches)
    mine = switched_on(copy.deepcopy(small.model))
    assert not reasons(mine)
    assert_numbers(under_autocast(mine, small.batches), stock, small.truth)


def test_products_inside_the_gated_unit(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast adapters compute in bfloat16, as the dense copies of their weights do."""
    asked, original = [], glu_contractions.backward

    def noted(dh: Any, gate: Any, up: Any, variant: str, gate_t: Any, up_t: Any, with_h: bool, last: bool) -> Any:
        asked.append((gate_t is not None, up_t is not None, with_h))
        return original(dh, gate, up, variant, gate_t, up_t, with_h, last)

    monkeypatch.setattr(glu_contractions, "backward", noted)
    mine = switched_on(copy.deepcopy(small.model), memory="fastest")
    assert not reasons(mine)
    ours, stock = (under_autocast(model, small.batches) for model in (mine, copy.deepcopy(small.model)))
    assert_numbers(ours, stock, small.truth)
    layers = mine.config.num_hidden_layers
    assert asked[:layers] == [(True, True, True)] * layers


def test_dropout_draws_the_same_masks_in_every_mode(small: Small) -> None:
    """Masks are drawn again where values are computed again; a dense copy kept changes roundings alone."""
    dropping, results = build(4, 512, lora_dropout=0.1), []
    for mode in ("fastest", "least"):
        model = switched_on(copy.deepcopy(dropping), memory=mode)
        assert not reasons(model)
        results.append(train(model, small.batches[:1]))
    fastest, least = results
    for name in fastest:
        assert (fastest[name] - least[name]).norm() <= TOLERANCE * fastest[name].norm(), name


def choose_by(choice: Callable[..., MemoryPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan every pass by ``choice``, also where all of it could be kept."""
    monkeypatch.setattr(planning, "choose", choice)
    monkeypatch.setattr(planner.Planner, "_all_kept", lambda *pass_: None)


@pytest.mark.parametrize("which", [0, -1], ids=["all_kept", "nothing_kept"])
def test_offloaded_inputs_come_back_right(which: int, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a plan that offloads every layer's input, three times over: host memory is used again."""

    def offload(costs: Costs, *rest: Any) -> MemoryPlan:
        return MemoryPlan(tuple([level for level in levels if level.offloaded][which] for levels in costs.layers))

    choose_by(offload, monkeypatch)
    assert_right(small)


# Memory ---------------------------------------------------------------------------------------------------------------


class Large(NamedTuple):
    """One model for all that follows, and the adapters it starts with; each test takes back what it switched on."""

    model: Any
    start: dict[str, torch.Tensor]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def large() -> Large:
    release()
    model = build(LAYERS, HIDDEN, VOCABULARY)
    return Large(model, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@contextmanager
def switched(model: Any, **config: Any) -> Iterator[None]:
    """With the backend on for that time, all layers being programs."""
    release()
    try:
        switched_on(model, **config)
        assert not reasons(model)
        yield
    finally:
        sloth_backend.undo(model)


class Outcome(NamedTuple):
    """What a short training run took."""

    plans: list[MemoryPlan]
    """Those that its passes followed, each once."""
    measured: int
    """Bytes: the most that was allocated."""
    losses: torch.Tensor
    warnings: list[str]

    def __str__(self) -> str:
        """For messages: prediction and measurement in MiB."""
        plan = self.plans[-1]
        budget = "no" if plan.budget_bytes is None else plan.budget_bytes >> 20
        return f"predicted {plan.predicted_peak_bytes >> 20}, measured {self.measured >> 20}, {budget} budget: {plan}"


def run_for_steps(large: Large, **config: Any) -> Outcome:
    """Train the large model with AdamW from its start, with the backend on for that time."""
    trained, plans = large.trained(), []
    for name, value in large.start.items():
        trained[name].data.copy_(value)
    planned = planner.Planner.planned

    def noted(*args: Any) -> MemoryPlan:
        plan = planned(*args)
        if not plans or plans[-1] is not plan:
            plans.append(plan)
        return plan

    with pytest.MonkeyPatch.context() as patch, switched(large.model, **config):
        patch.setattr(planner.Planner, "planned", noted)
        losses = steps(large.model, list(trained.values()))
        warned = [finding.reason for finding in plans_of(large.model) if finding.action == "warned"]
        return Outcome(plans, torch.cuda.max_memory_allocated(), losses, warned)


def steps(model: Any, trained: list[torch.nn.Parameter]) -> torch.Tensor:
    """The losses of ``STEPS`` steps."""
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-4), []
    for seed in range(STEPS):
        loss = model(**batch(ROWS, LENGTH, VOCABULARY, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).float().cpu()


def budget_gb(size: int) -> float:
    """The ``vram_budget_gb`` under which a plan may take ``size`` bytes."""
    return (size / (1 - SPARE_SHARE) + CONTEXT_BYTES) / GIB


class Ends(NamedTuple):
    """The run of least memory and the fastest."""

    least: Outcome
    fastest: Outcome

    def between(self, share: float) -> int:
        """Bytes: ``share`` of the way from the least plan's peak to the fastest's."""
        low, high = (outcome.plans[0].predicted_peak_bytes for outcome in self)
        return int(low + share * (high - low))


@pytest.fixture(scope="module")
def ends(large: Large) -> Ends:
    found = Ends(*(run_for_steps(large, memory=mode) for mode in ("least", "fastest")))
    assert found.between(1) > 2 * found.between(0), f"the plan does not matter at these sizes: {[*map(str, found)]}"
    return found


@pytest.mark.parametrize("mode", Ends._fields)
def test_the_peak_is_predicted(mode: str, ends: Ends) -> None:
    outcome: Outcome = getattr(ends, mode)
    (plan,) = outcome.plans
    assert plan.predicted_peak_bytes == pytest.approx(outcome.measured, rel=0.1), str(outcome)
    assert not [reason for reason in outcome.warnings if "out of memory" in reason]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.7])
def test_a_budget_is_kept_and_used(share: float, large: Large, ends: Ends) -> None:
    """Between the least plan and the fastest: never over, and not far below."""
    room = ends.between(share)
    outcome = run_for_steps(large, vram_budget_gb=budget_gb(room))
    (plan,) = outcome.plans
    assert plan.fits
    assert plan.budget_bytes == pytest.approx(room, abs=1024)
    assert plan.predicted_peak_bytes > room - (ends.between(1) - ends.between(0)) / 10, str(outcome)
    assert plan.predicted_peak_bytes == pytest.approx(outcome.measured, rel=0.1), str(outcome)
    assert outcome.measured <= room / (1 - SPARE_SHARE), str(outcome)


def test_offloaded_inputs_are_gone_between_the_passes(large: Large, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that autograd or the ring still holds: the first, over frozen embeddings, and the last."""

    def least(costs: Costs, *rest: Any) -> MemoryPlan:
        own = [sorted(levels, key=lambda level: len(level.kept)) for levels in costs.layers]
        return MemoryPlan(tuple(next(lv for lv in levels if bool(lv.offloaded) == offloads) for levels in own))

    held, inputs = {}, batch(8, 512)
    choose_by(least, monkeypatch)
    for offloads in (False, True):
        with switched(large.model):
            train(large.model, [inputs])
            before = torch.cuda.memory_allocated()
            loss = large.model(**inputs).loss
            torch.cuda.synchronize()
            held[offloads] = torch.cuda.memory_allocated() - before
            del loss
    assert held[False] - held[True] >= (LAYERS - 3) * 8 * 512 * HIDDEN * 2


def test_running_out_of_memory_is_survived(large: Large, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts on memory that is not there: half-way between the least plan and the fastest it ends."""
    monkeypatch.setattr(planner, "device_budget", lambda *args: 1 << 50)
    limit = set_limit(ends.between(0.5))
    outcome = run_for_steps(large, memory="auto")
    first, *_, last = (plan.predicted_peak_bytes for plan in outcome.plans)
    assert first == pytest.approx(ends.between(1), rel=0.02)
    assert last < first
    assert any(reason.startswith("out of memory") for reason in outcome.warnings)
    assert outcome.measured <= limit
    torch.testing.assert_close(outcome.losses, ends.least.losses, rtol=TOLERANCE, atol=0)


def set_limit(size: int) -> int:
    """From now on, to the end of the test, the allocator may hold ``size`` bytes."""
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    return size


def test_a_prediction_that_is_too_small_is_survived(large: Large, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level claims a third of the bytes that it holds."""
    original = planning.choose

    def misled(costs: Costs, *rest: Any) -> MemoryPlan:
        shrunk = {
            id(levels): tuple(replace(level, device_bytes=level.device_bytes // 3) for level in levels)
            for levels in costs.layers
        }
        return original(replace(costs, layers=tuple(shrunk[id(levels)] for levels in costs.layers)), *rest)

    monkeypatch.setattr(planning, "choose", misled)
    set_limit(ends.between(0.5))
    outcome = run_for_steps(large, memory="auto")
    assert any(reason.startswith("out of memory") for reason in outcome.warnings)
    torch.testing.assert_close(outcome.losses, ends.least.losses, rtol=TOLERANCE, atol=0)
