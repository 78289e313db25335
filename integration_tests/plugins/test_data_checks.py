"""Data checks: every fault counted as a plain loop counts it, wherever the rows are, and nothing taken from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForTokenClassification

from integration_tests import tiny
from sloth_backend.config import SlothConfig, SlothConfigError
from sloth_backend.data import Rows
from sloth_backend.run import Run
from sloth_plugins import data_checks
from sloth_plugins.data_checks import columns, look_at, sloth_check_data
from sloth_plugins.data_checks.counts import Counts, Text, texts_of
from sloth_plugins.data_checks.facts import ModelFacts, facts_of

FACTS = ModelFacts(embedding_rows=100, context=64, learned_positions=False, ends=frozenset({2}))
MASKED = -100


def row(prompt: int, answer: int, end: bool = True) -> dict[str, list[int]]:
    """A prompt that is not trained and an answer that is, of so many tokens."""
    ids = [5] * prompt + [7] * answer
    if end and ids:
        ids[-1] = 2
    return {"input_ids": ids, "labels": [MASKED] * prompt + ids[prompt:]}


def said(dataset: Any, facts: ModelFacts = FACTS, **options: Any) -> list[str]:
    """The findings, which must be without problems."""
    findings, problems = look_at(Rows("train", dataset, **options), facts)
    assert not problems
    return [f"{finding.action}: {finding.reason}" for finding in findings]


def wrong(dataset: Any, facts: ModelFacts = FACTS, **options: Any) -> str:
    """The one problem."""
    (problem,) = look_at(Rows("train", dataset, **options), facts)[1]
    return problem


def test_rows_without_faults() -> None:
    rows = Dataset.from_list([row(3, 4), row(2, 9)])
    assert said(rows, max_length=12, longer="keep_start") == [
        "skipped: looked at all 2 rows: 18 tokens, the longest 11; no faults"
    ]


@pytest.mark.parametrize(("longer", "texts"), [
    ("keep_start", [
        "3 texts of more than 10 tokens (the longest 22): they are cut at their end, 24 tokens (52.2%) are lost",
        "1 text whose answer, all trained tokens, lies beyond that cut: they train nothing",
        "2 texts whose answer is cut in two there: a part of its trained tokens is lost",
    ]),
    ("keep_end", [
        "3 texts of more than 10 tokens (the longest 22): they are cut at their start, 24 tokens (52.2%) are lost",
        "1 text whose answer is cut in two there: a part of its trained tokens is lost",
    ]),
    ("drop", ["3 texts of more than 10 tokens (the longest 22): they are dropped, 54 tokens (100.0%) are lost"]),
    ("split", ["3 texts of more than 10 tokens (the longest 22): they are split into several rows"]),
])  # fmt: skip
def test_what_a_cut_takes_away(longer: Any, texts: list[str]) -> None:
    rows = [row(8, 8), row(12, 4), row(2, 20)] + [row(3, 4)] * (longer == "drop")
    lost = {"drop": "54 tokens (88.5%)"}
    found = said(Dataset.from_list(rows), max_length=10, longer=longer)[:-1]
    expected = [f"warned: {text}".replace("54 tokens (100.0%)", lost.get(longer, "")) for text in texts]
    assert found == [text.replace("24 tokens (52.2%)", "24 tokens (44.4%)") for text in expected]


def test_rows_whose_every_token_trains_have_no_answer_to_lose() -> None:
    found = said(Dataset.from_list([row(0, 20)]), max_length=10, longer="keep_start")
    assert len(found) == 2
    assert "1 text of more than 10 tokens" in found[0]


def test_rows_that_train_nothing() -> None:
    silent = {"input_ids": [5, 6], "labels": [MASKED, MASKED]}
    first = {"input_ids": [5, 6], "labels": [5, MASKED]}  # nothing comes before it to predict it
    found = said(Dataset.from_list([row(3, 4), silent, first]))
    assert found[0] == "warned: 2 texts (66.7%) without a trained token: all their labels are -100"
    assert "no row of the train data has a trained token: all labels are -100" in wrong(Dataset.from_list([silent]))
    findings, problems = look_at(Rows("eval", Dataset.from_list([silent])), FACTS)
    assert not problems
    assert "without a trained token" in findings[0].reason


@pytest.mark.parametrize("longer", ["keep_start", "drop"])
def test_a_cut_that_leaves_nothing_to_learn_is_an_error(longer: Any) -> None:
    problem = wrong(Dataset.from_list([row(8, 8), row(9, 1)]), max_length=8, longer=longer)
    assert "a row may have 8 tokens, which takes all of them from 2 rows" in problem
    assert "16" in problem


@pytest.mark.parametrize(("number", "remedy"), [(100, "tokenizer of this model"), (-1, "tokenizer of this model")])
def test_ids_without_a_row_are_an_error(number: int, remedy: str) -> None:
    bad = {"input_ids": [5, number], "labels": [5, 6]}
    problem = wrong(Dataset.from_list([row(1, 1), bad, bad]))
    assert problem.startswith(
        f"2 rows of the train data with ids that the embedding of 100 rows does not have, such as {number}:"
    )
    assert remedy in problem
    labels = wrong(Dataset.from_list([{"input_ids": [5, 6], "labels": [5, number]}]))
    assert labels.startswith("1 row of the train data with labels")


def test_ids_of_added_tokens_ask_for_a_larger_embedding() -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    data = [Rows("train", Dataset.from_list([{"input_ids": tokenizer("the <|new|>")["input_ids"]}]))]
    with pytest.raises(SlothConfigError, match=r"'<\|new\|>'.*resize_token_embeddings\(317\)"):
        sloth_check_data(data, model, tokenizer, Run("user", SlothConfig()))
    model.resize_token_embeddings(len(tokenizer))
    assert sloth_check_data(data, model, tokenizer, Run("user", SlothConfig()))
    assert sloth_check_data(data, model, tokenizer, Run("user", SlothConfig(check_data=False))) is None


def test_labels_of_another_number() -> None:
    assert "more or fewer labels" in said(Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6]}]))[0]


def test_labels_of_a_model_that_predicts_no_next_token_are_its_own() -> None:
    config = tiny.make_model(tiny.make_tokenizer()).config
    facts = facts_of(LlamaForTokenClassification(config), None)
    assert len(said(Dataset.from_list([{"input_ids": [5, 6], "labels": [MASKED, 9999, 1]}]), facts)) == 1
    assert "ids that the embedding" in wrong(Dataset.from_list([{"input_ids": [999]}]), facts)


def test_rows_beyond_the_context() -> None:
    rows = Dataset.from_list([row(3, 100), row(3, 4)])
    assert "1 text with more tokens than the 64 positions" in said(rows)[0]
    assert len(said(rows, max_length=64, longer="keep_start")) == 3  # cut, answer cut, looked at
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    facts = facts_of(GPT2LMHeadModel(config), None)
    assert facts == ModelFacts(100, 64, True, frozenset({2}))
    assert "1 row of the train data with more tokens than the model has positions, 64" in wrong(rows, facts)


def test_the_context_of_a_scaled_rope_is_what_it_was_scaled_to() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    facts = facts_of(tiny.make_model(tiny.make_tokenizer(), rope_parameters=scaling), None)
    assert (facts.context, facts.learned_positions) == (1024, False)


def test_rows_that_were_probably_cut_before() -> None:
    whole = [row(3, n) for n in range(4, 14)]
    cut = [row(3, 17, end=False)] * 3
    assert "3 texts of exactly 20 tokens, the most of all, without eos" in said(Dataset.from_list(whole + cut))[0]
    assert len(said(Dataset.from_list([*whole, row(3, 17), row(3, 17), row(3, 17)]))) == 1  # they end
    assert len(said(Dataset.from_list(cut * 9))) == 1  # blocks of a stream of tokens


def test_pairs_of_answers_are_two_texts_each() -> None:
    pairs = [{"prompt_ids": [5] * 6, "chosen_ids": [7] * 3, "rejected_ids": [8] * n} for n in (2, 9)]
    found = said(Dataset.from_list(pairs), max_length=8, longer="keep_start")
    assert "3 texts of more than 8 tokens (the longest 15)" in found[0]
    assert "3 texts whose answer is cut in two" in found[1]
    found = said(Dataset.from_list(pairs), max_length=6, longer="keep_end")
    assert "1 text whose answer is cut in two" in found[1]
    assert texts_of(("input_ids", "attention_mask")) == (Text(("input_ids",)),)


@st.composite
def ragged_rows(draw: st.DrawFn) -> list[dict[str, list[int]]]:
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))
    ids = [draw(st.lists(st.integers(-2, 104), min_size=n, max_size=n)) for n in lengths]
    kept = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    return [
        {"input_ids": a, "labels": [x if k else MASKED for x, k in zip(a, b, strict=True)]}
        for a, b in zip(ids, kept, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(rows=ragged_rows(), bound=st.integers(1, 12), longer=st.sampled_from(["keep_start", "keep_end"]))
def test_counts_are_those_of_a_plain_loop(rows: list[dict[str, list[int]]], bound: int, longer: Any) -> None:
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
    dataset = Dataset.from_list(rows, features=features)
    counts = counted(dataset, Rows("train", dataset, bound, longer))
    part = slice(None, bound) if longer == "keep_start" else slice(-bound, None)
    before = [sum(label != MASKED for label in one["labels"][1:]) for one in rows]
    after = [sum(label != MASKED for label in one["labels"][part][1:]) for one in rows]
    assert counts.untrained == before.count(0)
    assert counts.emptied == sum(a == 0 < b for a, b in zip(after, before, strict=True))
    assert counts.shortened == sum(0 < a < b for a, b in zip(after, before, strict=True))
    assert np.concatenate(counts.lengths).tolist() == [len(one["input_ids"]) for one in rows]
    assert np.concatenate(counts.last).tolist() == [([-1] + one["input_ids"])[-1] for one in rows]
    assert counts.lost == sum(max(0, len(one["input_ids"]) - bound) for one in rows)
    assert counts.beyond_rows == sum(any(not 0 <= x < 100 for x in one["input_ids"]) for one in rows)
    wrong_labels = [any(not 0 <= x < 100 and x != MASKED for x in one["labels"]) for one in rows]
    assert counts.labels_beyond_rows == sum(wrong_labels)


def counted(dataset: Any, rows: Rows) -> Counts:
    source, counts = columns.open_source(dataset), Counts()
    for piece in source.pieces:
        for text in texts_of(source.columns):
            counts.add(piece, text, rows, 100)
    return counts


ROWS = [row(i % 7, 1 + i % 11) for i in range(3000)]


def lengths(dataset: Any) -> list[int]:
    return np.concatenate(counted(dataset, Rows("train", dataset)).lengths).tolist()


@pytest.mark.parametrize("places", [
    range(3000), range(0, 3000, 2), range(0, 3000, 50), random.Random(0).sample(range(3000), 900), [7, 7, 5],
], ids=["all", "half", "few", "shuffled", "twice"])  # fmt: skip
def test_selected_rows_are_read_in_the_order_of_the_table_each_once(places: Any) -> None:
    dataset = Dataset.from_list(ROWS).select(places)
    assert lengths(dataset) == [len(ROWS[i]["input_ids"]) for i in sorted(set(places))]


def test_every_place_where_rows_are_kept_gives_the_same() -> None:
    expected = [len(one["input_ids"]) for one in ROWS[:40]]
    plain = Dataset.from_list(ROWS[:40])
    tensors = [{name: torch.tensor(values) for name, values in one.items()} for one in ROWS[:40]]
    for dataset in (plain, plain.with_format("torch"), plain.to_iterable_dataset(), ROWS[:40], tensors):
        assert lengths(dataset) == expected
    fixed = Dataset.from_dict({"input_ids": np.ones((6, 9), np.int32)}).cast_column(
        "input_ids", List(Value("int32"), 9)
    )
    assert lengths(fixed) == [9] * 6
    assert lengths(fixed.select([1, 4])) == [9] * 2


def test_a_large_set_is_sampled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LIMIT", 400)
    monkeypatch.setattr(columns, "BLOCK", 20)
    for dataset in (Dataset.from_list(ROWS), Dataset.from_list(ROWS).shuffle(seed=0)):
        found = said(dataset)
        assert found[-1].startswith("skipped: looked at 400 of 3,000 rows, evenly spaced")
    bad = Dataset.from_list([*ROWS, {"input_ids": [100], "labels": [5]}])
    assert wrong(bad.select([3000, *range(40)]))


class Random(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows drawn by chance, from every generator that there is."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = 2 + random.randrange(5) + int(np.random.randint(5)) + int(torch.randint(5, ()))
        return {"input_ids": torch.full((size,), 5)}


def test_rows_that_are_drawn_by_chance_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # pyright: ignore
    assert "looked at 256 of 1,000 rows" in said(Random())[-1]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # pyright: ignore


def test_a_stream_keeps_its_rows() -> None:
    asked: list[int] = []

    def rows() -> Iterator[dict[str, list[int]]]:
        for i in range(2000):
            asked.append(i)
            yield ROWS[i]

    dataset = IterableDataset.from_generator(rows)
    assert said(dataset)[-1].startswith("skipped: looked at the first 256 rows of a stream")
    assert len(asked) <= columns.FEW + 1
    assert next(iter(dataset)) == ROWS[0]


class Once(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Rows that are gone when they were asked for."""

    def __init__(self) -> None:
        self.rows = iter(ROWS)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return self.rows


def test_what_can_only_be_iterated_over_is_left_alone() -> None:
    dataset = Once()
    assert said(dataset) == ["skipped: not looked at: it can only be iterated over, which would take rows from it"]
    assert next(dataset.rows) == ROWS[0]


@pytest.mark.parametrize("dataset", [
    tiny.make_dataset("text"), ["the quick brown fox"], [{"text": "the"}], Dataset.from_dict({"input_ids": [[0.5]]}),
], ids=["text", "strings", "rows", "floats"])  # fmt: skip
def test_rows_that_are_not_tokenised_are_left_alone(dataset: Any) -> None:
    (finding,) = said(dataset)
    assert finding.startswith("skipped: not looked at: its rows are no mappings") or "no column of token ids" in finding


def test_an_empty_set_is_worth_a_warning() -> None:
    for empty in (Dataset.from_list(ROWS[:2]).select([]), []):
        assert said(empty) == ["warned: it has no rows"]


def test_all_problems_of_all_sets_are_raised_together() -> None:
    silent = Dataset.from_list([{"input_ids": [5], "labels": [MASKED]}])
    beyond = Dataset.from_list([{"input_ids": [999]}])
    model = tiny.make_model(tiny.make_tokenizer())
    with pytest.raises(SlothConfigError) as error:
        sloth_check_data([Rows("train", silent), Rows("eval", beyond)], model, None, Run("user", SlothConfig()))
    assert len(error.value.problems) == 2
    assert data_checks.__name__ == "sloth_plugins.data_checks"
