"""Passes of tens of thousands of tokens on a GPU: small terms survive the products, and every plan's gradients are
those of the same rows one at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_backend
from integration_tests.benchmarks.training.rows import start_adapters
from integration_tests.four_bit import from_bitsandbytes
from integration_tests.gpu.test_layer_programs import choose_by
from integration_tests.plugins.layer_programs.common import adapted, quantised, reasons, switched_on
from sloth_backend.plan import Costs, Level, MemoryPlan
from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import Weight4bit
from sloth_kernels.linears import Linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, UPDATE = 32, 2e-4
"""Of an adapter, and what B is after its first step."""
SAMPLED = 256
"""Rows that a truth in float64 is computed for."""
SURVIVES = 0.97
"""The least share of an adapter's term that is left in a result: its own rounding to bfloat16 costs no more."""
Grads = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


# Small terms ----------------------------------------------------------------------------------------------------------


def surviving(tokens: int, n_in: int, n_out: int, keeps: bool) -> float:
    """The share of an adapter's term in the result of a linear over 4-bit weights."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    x_TK = torch.randn(tokens, n_in, **made)
    packed, state = functional.quantize_4bit(torch.randn(n_out, n_in, **made).mul_(0.02), quant_type="nf4")
    A_RK = torch.rand(RANK, n_in, **made).mul_(2).sub_(1).mul_(n_in**-0.5)
    B_NR = torch.randn(n_out, RANK, **made).sign_().mul_(UPDATE)
    linear = LoraLinear(Weight4bit(from_bitsandbytes(packed, state)), None, (Adapter(A_RK, B_NR, 1.0),))
    stage = Linears("x", ["y"], lambda: [linear])
    stage.group.keeps = keeps
    y_TN, _ = stage.bind(None).forward(x_TK)
    at = torch.randperm(tokens, device=DEVICE)[:SAMPLED]
    x, W, A, B = (tensor.double() for tensor in (x_TK[at], linear.weight.dense(torch.bfloat16), A_RK, B_NR))
    term = x @ A.t() @ B.t()
    return (((y_TN[at].double() - x @ W.t()) * term).sum() / term.square().sum()).item()


@pytest.mark.parametrize("sizes", [(4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096)], ids=str)
@pytest.mark.parametrize("tokens", [2048, 32768])
@pytest.mark.parametrize("keeps", [False, True], ids=["made", "kept"])
def test_an_adapters_first_update_is_not_lost(keeps: bool, tokens: int, sizes: tuple[int, int]) -> None:
    """cuBLAS would round the product with the weight before it adds the adapter's term, of which a quarter is left."""
    assert surviving(tokens, *sizes, keeps) > SURVIVES


# Plans ----------------------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY = 16, 2048, 2048
SIZES = (4096, 14336)
"""Hidden and intermediate, of Llama 8B."""
TOLERANCE = 0.1
"""Relative, in Frobenius norms. Another order of bfloat16 roundings moves gradients of queries and keys, small
differences of large terms, by up to 0.04; those of another layout or of lost terms are off by their own size."""


def model_of(hidden: int, intermediate: int) -> Any:
    """Two layers of such a Llama over NF4 under LoRA, in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        quantised(model, compute_dtype=torch.bfloat16)
    return adapted(model, r=RANK, lora_alpha=RANK).train()


def start(model: Any, updated: bool) -> None:
    """Adapters before their first update, or after it."""
    start_adapters(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if updated and "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).sign_() * UPDATE)


def gradients(model: Any, ids: torch.Tensor, rows: int) -> Grads:
    """Of the mean loss of all rows, ``rows`` of them a pass."""
    total: Grads = {}
    for part in ids.split(rows):
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=part, labels=part).loss * (len(part) / len(ids))
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                own = parameter.grad.float()
                total[name] = total[name] + own if name in total else own
                parameter.grad = None
    return total


def wrong(mine: Grads, true: Grads) -> dict[str, float]:
    """By how much gradients are off that are off by more than roundings."""
    off = {name: ((mine[name] - grad).norm() / grad.norm()).item() for name, grad in true.items() if grad.any()}
    return {name: share for name, share in off.items() if not share <= TOLERANCE}


class Planned:
    """A model whose short passes keep everything, dense weights of both layers too, and whose long ones do as told."""

    def __init__(self, model: Any, long: int, patch: pytest.MonkeyPatch) -> None:
        self.model, self.long = model, long
        self.level, self.cached, self.offered = "", 0, list[Level]()
        choose_by(self._choice, patch)

    def _choice(self, costs: Costs, *rest: Any) -> MemoryPlan:
        if costs.tokens < self.long:
            return MemoryPlan(tuple(levels[0] for levels in costs.layers), cached_layers=len(costs.layers))
        self.offered[:] = costs.layers[0]
        named = [next((own for own in levels if own.name == self.level), levels[0]) for levels in costs.layers]
        return MemoryPlan(tuple(named), cached_layers=self.cached)

    def wrong(self, ids: torch.Tensor, true: Grads, updated: bool) -> list[str]:
        """What is wrong with the gradients of one pass of all rows that follows short ones, and of another."""
        found = []
        switched_on(self.model)
        assert not reasons(self.model)
        for nth in ("first", "second"):
            gradients(self.model, ids[:2], 1)
            start(self.model, updated)
            if off := wrong(gradients(self.model, ids, len(ids)), true):
                worst = max(off, key=lambda name: off[name])
                found.append(
                    f"{self.level}, {self.cached} cached, {nth}: {len(off)} of {len(true)}, {worst} {off[worst]:.2f}"
                )
        sloth_backend.undo(self.model)
        return found


def case(rows: int, updated: bool) -> tuple[Any, torch.Tensor, Grads]:
    """A model, rows, and their gradients one at a time."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator).to(DEVICE)
    model = model_of(*SIZES)
    start(model, updated)
    return model, ids, gradients(model, ids, 1)


@pytest.mark.parametrize("updated", [False, True])
def test_every_plan_has_the_gradients_of_row_by_row(updated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, true = case(ROWS, updated)
    planned = Planned(model, len(ids) * LENGTH, monkeypatch)
    broken = planned.wrong(ids, true, updated)
    assert len(planned.offered) > 5
    for level in list(planned.offered):
        for cached in (0, 1):
            planned.level, planned.cached = level.name, cached
            broken += planned.wrong(ids, true, updated)
    assert not broken, "\n".join(broken)


def test_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,536 tokens: everything kept, and as little as there is."""
    model, ids, true = case(2 * ROWS, False)
    planned = Planned(model, len(ids) * LENGTH, monkeypatch)
    broken = planned.wrong(ids, true, False)
    for level in (planned.offered[0], planned.offered[-1]):
        for cached in (0, 1, 2):
            planned.level, planned.cached = level.name, cached
            broken += planned.wrong(ids, true, False)
    assert not broken, "\n".join(broken)
