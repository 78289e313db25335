"""The untrained-embedding fix: rows found, set to the exact mean, in every shape a matrix comes in, and taken back."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_plugins import embedding_storage
from sloth_plugins.embedding_fix import Matrix, fix, sloth_fix_embeddings, untrained_rows

VOCAB, HIDDEN = 259, 24
ROWS = [3, 100, 101, 250, 258]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_model(dtype: torch.dtype = torch.float32, tied: bool = False, plant: bool = True, **options: int) -> nn.Module:
    """A tiny Llama; ``plant`` gives both embeddings rows of about 1e-23 (0 in float16, which has nothing smaller)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        **options,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for module in (model.model.embed_tokens, model.lm_head):
        # An uneven column, so that a wrong divisor shows far above rounding.
        module.weight.data[:, 0] += 1
        if plant:
            module.weight.data[ROWS] = torch.randn(len(ROWS), HIDDEN, dtype=torch.float64).mul(1e-23).to(dtype)
    return model


def repair(model: nn.Module, edits: Edits | None = None, **options: object) -> list[Finding]:
    """Run the hook."""
    run = Run("user", SlothConfig(**options))  # pyright: ignore[reportArgumentType]
    return sloth_fix_embeddings(model, None, run, edits or Edits()) or []


def true_mean(weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The mean of all other rows, in float64 from the start to the end."""
    kept = [i for i in range(len(weight)) if i not in rows]
    return weight[kept].double().mean(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_rows_get_the_exact_mean(dtype: torch.dtype, frozen: bool) -> None:
    model = make_model(dtype).requires_grad_(not frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    findings = repair(model)
    assert [(f.action, f.subject) for f in findings] == [
        ("changed", "model.embed_tokens.weight"),
        ("changed", "lm_head.weight"),
    ]
    assert all(f"{len(ROWS)} of {VOCAB} rows" in f.reason for f in findings)
    for name, parameter in model.named_parameters():
        assert id(parameter) == identities[name]
        assert parameter.requires_grad is not frozen
        assert parameter.grad is None
        expected = before[name].clone()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected[ROWS] = true_mean(before[name], ROWS).to(dtype)
        torch.testing.assert_close(parameter.data, expected, rtol=0, atol=0)


def test_the_mean_over_all_rows_would_be_seen() -> None:
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    repair(model)
    biased = before.double().mean(dim=0)
    assert (model.lm_head.weight[ROWS[0]] - biased).abs().max() > 0.01


def test_a_float32_sum_would_be_seen() -> None:
    weight = torch.ones(1002, 2)
    weight[0] = 2**24  # from here on float32 steps by 2
    weight[-1] = 0
    truth = true_mean(weight, [1001]).float()
    assert not torch.equal(functools.reduce(torch.add, weight.unbind()) / 1001, truth)
    matrix = Matrix(["w"], nn.Parameter(weight))
    fix(matrix, 1e-16, Edits())
    assert torch.equal(matrix.weight[-1].data, truth)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_model(torch.bfloat16), make_model(torch.bfloat16)
    repair(whole)
    monkeypatch.setattr(embedding_storage, "CHUNK_ELEMENTS", 7 * HIDDEN)
    repair(parts)
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)


def test_healthy_model_is_not_touched() -> None:
    model = make_model(plant=False)
    before = copy.deepcopy(model.state_dict())
    edits = Edits()
    findings = repair(model, edits)
    assert [(f.action, f.reason) for f in findings] == [("skipped", "no untrained rows")] * 2
    assert edits.mark() == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_second_run_finds_nothing() -> None:
    model = make_model()
    repair(model)
    assert {f.action for f in repair(model)} == {"skipped"}


def test_switched_off() -> None:
    assert repair(make_model(), fix_embeddings=False) == []


def test_tied_matrices_are_fixed_once() -> None:
    model = make_model(tied=True)
    before = model.lm_head.weight.detach().clone()
    findings = repair(model)
    assert [(f.action, f.subject) for f in findings] == [("changed", "model.embed_tokens.weight = lm_head.weight")]
    torch.testing.assert_close(model.lm_head.weight[3].data, true_mean(before, ROWS).float(), rtol=0, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_padding_row_of_the_input_stays_zero() -> None:
    model = make_model(pad_token_id=7)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
        model.lm_head.weight[7] = 0
    before = model.model.embed_tokens.weight.detach().clone()
    repair(model)
    assert not model.model.embed_tokens.weight[7].any()
    assert model.lm_head.weight[7].any()  # logits of this row would stay at 0, above those of all unlikely tokens
    torch.testing.assert_close(
        model.model.embed_tokens.weight[3].data, true_mean(before, [*ROWS, 7]).float(), rtol=0, atol=0
    )


def test_padding_row_alone_is_no_fault() -> None:
    findings = repair(make_model(pad_token_id=7, plant=False))
    assert [f.action for f in findings] == ["skipped", "skipped"]


def test_threshold_is_the_users() -> None:
    model = make_model(plant=False)
    with torch.no_grad():
        model.lm_head.weight[5] = 1e-9
    assert repair(model)[1].action == "skipped"
    assert repair(model, untrained_threshold=1e-8)[1].action == "changed"


def test_untrained_rows_take_no_part_in_the_sum() -> None:
    model = make_model(plant=False)
    model.lm_head.weight.data[ROWS] = 0.01
    before = model.lm_head.weight.detach().clone()
    repair(model, untrained_threshold=0.02)
    torch.testing.assert_close(model.lm_head.weight[3].data, true_mean(before, ROWS).float(), rtol=0, atol=0)


def test_undo_restores_the_rows_bit_for_bit() -> None:
    model = make_model(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    edits = Edits()
    repair(model, edits)
    edits.rollback()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_undo_keeps_rows_that_training_has_moved() -> None:
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    edits = Edits()
    repair(model, edits)
    with torch.no_grad():
        model.lm_head.weight[100] += 1
    moved = model.lm_head.weight[100].detach().clone()
    edits.rollback()
    assert torch.equal(model.lm_head.weight[100], moved)
    assert torch.equal(model.lm_head.weight[101], before[101])


@pytest.mark.parametrize("value", [0.0, 1e-23])
def test_all_rows_untrained(value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    finding = repair(model)[1]
    assert finding.action == "warned"
    assert "all 259 rows" in finding.reason
    assert (model.lm_head.weight == value).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_no_number_is_not_written(value: float) -> None:
    model = make_model()
    model.lm_head.weight.data[50, 2] = value
    before = model.lm_head.weight.detach().clone()
    finding = repair(model)[1]
    assert finding.action == "warned"
    assert torch.equal(model.lm_head.weight.nan_to_num(), before.nan_to_num())


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = make_model(plant=False)
    assert {f.action for f in repair(model)} == {"warned"}


def test_quantised_embedding_is_left_alone() -> None:
    model = make_model()
    weight = model.lm_head.weight
    del model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.data.mul(100).to(torch.int8), requires_grad=False)
    finding = repair(model)[1]
    assert finding.action == "skipped"
    assert "quantised (int8)" in finding.reason


def test_flattened_weight_is_left_alone() -> None:
    model = make_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.flatten())
    assert "sharded" in repair(model)[1].reason


def test_model_without_embeddings() -> None:
    assert [f.action for f in repair(nn.Linear(2, 2))] == ["skipped"]


def peft_model(**options: object) -> nn.Module:
    """A planted model inside PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, **options))  # pyright: ignore


def test_peft_adapters_are_left_as_they_are() -> None:
    model = peft_model(target_modules=["q_proj", "embed_tokens", "lm_head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    findings = repair(model)
    assert [f.subject for f in findings] == ["model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight"]
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert {name.split("base_model.model.")[1] for name in changed} == {f.subject for f in findings}


def test_peft_modules_to_save_and_their_originals() -> None:
    model = peft_model(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    findings = repair(model)
    assert [(f.action, f.subject) for f in findings] == [
        ("changed", "model.embed_tokens.original_module.weight"),
        ("changed", "model.embed_tokens.modules_to_save.default.weight"),
        ("changed", "lm_head.original_module.weight"),
        ("changed", "lm_head.modules_to_save.default.weight"),
    ]
    wrapper = model.base_model.model.lm_head
    assert torch.equal(wrapper.original_module.weight, wrapper.modules_to_save["default"].weight)


@pytest.mark.parametrize("tied", [False, True])
def test_peft_trainable_tokens(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_model(tied=tied)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 9])
    )
    before = copy.deepcopy(model.state_dict())
    edits = Edits()
    repair(model, edits)
    adapter = base.model.embed_tokens.token_adapter
    weight, rows = adapter.base_layer.weight, adapter.trainable_tokens_delta["default"]
    assert torch.equal(rows[0], weight[3])  # untrained like its original, and it takes the original's place
    assert torch.equal(rows[1], weight[9])
    assert rows.abs().amax(dim=1).min() > 1e-3
    edits.rollback()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_of_a_repaired_row_are_finite() -> None:
    torch.manual_seed(0)
    model = make_model(torch.bfloat16)
    repair(model)
    ids = torch.tensor([[5, 3, 100, 6, 250]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sets(st.integers(0, 63), max_size=63),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_set_of_rows_is_found(rows: set[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 5, generator=generator).to(dtype)
    weight[:, 0] += 0.5 + weight[:, 0].abs()
    weight[sorted(rows)] = 1e-30
    assert untrained_rows(weight, 1e-16).tolist() == sorted(rows)
    parameter = nn.Parameter(weight.clone())
    fix(Matrix(["w"], parameter), 1e-16, Edits())
    for row in rows:
        torch.testing.assert_close(parameter[row].data, true_mean(weight, sorted(rows)).to(dtype), rtol=0, atol=0)
