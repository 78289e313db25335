"""What the loss is reckoned to hold and to cost, and what passes of documents look like to the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from integration_tests import tiny
from integration_tests.plugins.layer_programs.common import adapted, switched_on
from integration_tests.sameness.architectures import make_batches, make_model
from sloth_plugins.layer_programs import head
from sloth_plugins.layer_programs.head import LOSS_TILES, TRAINED_TILES, LossTile
from sloth_plugins.layer_programs.layer import documents_shape
from sloth_plugins.program_layers import planner_of

CPU = torch.device("cpu")
VOCABULARY, HIDDEN, TOKENS = 128_256, 2048, 4096
DW = 2 * VOCABULARY * HIDDEN
LOGITS = 2 * VOCABULARY * TOKENS


def linear(trained: bool) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.bfloat16)
    return made.requires_grad_(trained)


def cost(trained: bool, tile: LossTile) -> tuple[int, float]:
    return head.cost(linear(trained), 0, TOKENS, tile)


def test_a_frozen_head_holds_a_tile_of_logits() -> None:
    assert cost(False, LossTile(2 * LOGITS)) == (LOGITS, 0.0)
    half, seconds = cost(False, LossTile(LOGITS // 2))
    assert half == LOGITS // 2
    assert seconds > 0


def test_a_trained_head_holds_its_gradient_too() -> None:
    """Of one tile in bf16, of several in float32 unless they may round; the logits go before a second copy comes."""
    assert cost(True, LossTile(2 * LOGITS))[0] == DW + LOGITS
    assert cost(True, LossTile(LOGITS // 2))[0] == 2 * DW + max(LOGITS // 2, DW)
    assert cost(True, LossTile(LOGITS // 2, rounded_sums=True))[0] == DW + LOGITS // 2


def test_exact_sums_are_preferred() -> None:
    exact, rounded = (cost(True, LossTile(LOGITS // 2, rounds))[1] for rounds in (False, True))
    assert exact < rounded


@pytest.mark.parametrize(("trained", "dtype", "tiles"), [
    (False, torch.bfloat16, LOSS_TILES), (True, torch.float32, LOSS_TILES), (True, torch.bfloat16, TRAINED_TILES),
])  # fmt: skip
def test_only_a_trained_bf16_head_may_round(trained: bool, dtype: torch.dtype, tiles: Any) -> None:
    assert head.tiles_of(nn.Linear(2, 2, dtype=dtype).requires_grad_(trained)) == tiles
    assert head.tiles_of(None) == LOSS_TILES


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_tied_heads_gradient_waits_for_the_embeddings(tied: bool, trained: bool) -> None:
    model = tiny.make_model(tiny.make_tokenizer(), tie_word_embeddings=tied).requires_grad_(trained)
    weight = model.get_output_embeddings().weight
    assert head.waiting_bytes(model) == (weight.nbytes if tied and trained else 0)
    assert head.waiting_bytes(None) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_train_by_themselves(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their embedding's weight would be copied for a look at it, has no gradient that stays; the loss makes both."""
    model = make_model("llama", dtype=torch.bfloat16, tie_word_embeddings=tied)
    rows = adapted(model, trainable_token_indices=[3, 5]).get_base_model()
    own = rows.get_output_embeddings()
    assert hasattr(own, "token_adapter") is tied
    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", lambda *args: pytest.fail("copied"))
    assert head.still_free(rows) == (0, 0)
    assert head.waiting_bytes(rows) == 0
    assert head.tiles_of(own) == (TRAINED_TILES if tied else LOSS_TILES)
    frozen = nn.Linear(48, 99, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    more = [head.cost(each, 0, 64, LOSS_TILES[0])[0] for each in (own, frozen)]
    assert more[0] - more[1] == (2 * frozen.weight.nbytes if tied else 0)


@given(tokens=st.integers(1, 200_000), longest=st.integers(1, 200_000))
def test_passes_of_documents_have_few_shapes(tokens: int, longest: int) -> None:
    longest = min(tokens, longest)
    shape = documents_shape(tokens, longest, None)
    assert shape.tokens >= tokens
    assert shape.tokens <= tokens + max(255, tokens // 8)
    assert longest <= shape.length < max(2 * longest, 2)


def test_a_pass_costs_at_least_what_the_host_needs_and_grows_with_its_tokens() -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    planner = planner_of(switched_on(model))
    seconds = [planner.pass_seconds(tokens, 256, None, alone=False) for tokens in (256, 1024, 1 << 24, 1 << 26)]
    assert seconds[0] == seconds[1] == planner.least_seconds
    assert seconds[1] < seconds[2] < seconds[3]


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_that_is_all_of_its_step_has_no_gradients_before_its_backward(tied: bool) -> None:
    model = tiny.make_model(tiny.make_tokenizer(), tie_word_embeddings=tied).requires_grad_(True)
    planner = planner_of(switched_on(model))
    shapes = [documents_shape(4096, 256, None, alone) for alone in (False, True)]
    peaks = [planner.planned(shape, CPU).predicted_peak_bytes for shape in shapes]
    gradients = sum(p.nbytes for p in model.parameters())
    assert 0.9 * gradients < peaks[0] - peaks[1] <= gradients


def test_a_pass_is_alone_where_steps_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    planner, seen = planner_of(switched_on(model)), []
    original = planner.planned
    monkeypatch.setattr(planner, "planned", lambda shape, device: seen.append(shape.alone) or original(shape, device))
    for passes in (1, 3, 1, 1):
        for batch in make_batches(passes, 2, 16):
            model(**batch).loss.backward()
        model.zero_grad()
    assert seen == [True, True, False, False, False, True]
