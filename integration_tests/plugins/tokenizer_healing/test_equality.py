"""More than 100,000 texts for each real file: the healed tokenizer encodes all of them as its truth does."""

from __future__ import annotations

import json

import pytest

from integration_tests.benchmarks.tokenizers import compare, table, texts
from integration_tests.child import ROOT
from integration_tests.plugins.tokenizer_healing.breaks import FILES, TEKKEN


@pytest.mark.slow
@pytest.mark.parametrize("version", FILES)
def test_equal_on_all_texts(version: str) -> None:
    row = compare(version)
    assert row["texts"] > 100_000
    assert row["examples after"] == []
    assert row["different after"] == 0
    assert row["findings on the healed one"] == []
    assert row["seconds to look again"] < 3
    assert row["seconds to rebuild"] < 3
    assert row["data checks, % of tokenising"] < 2
    # transformers converts tekken files as they are, and SentencePiece's otherwise.
    assert (row["different before"] == 0) is (version in TEKKEN)


@pytest.mark.slow
def test_the_texts_are_of_all_kinds() -> None:
    found = texts()
    assert len(set(found)) == len(found) > 100_000
    characters = set("".join(found))
    assert len(characters) > 140_000
    assert max(map(len, found)) > 500


def test_the_table_tells_what_was_measured() -> None:
    row = {"vocabulary": 32000, "texts": 100001, "different before": 7, "different after": 0}
    row |= {"seconds to look again": 1.5, "seconds to rebuild": 2.5}
    row |= {"data checks, % of tokenising": 0.4}
    both = {"v1": row, "v2": {**row, "faults": {"a": "healed", "b|c": "reported", "d": "not changed: []"}}}
    text = table({"files": both, "packages": {"tokenizers": "1"}, "python": "3", "machine": "one core of a Z80"})
    assert "Python 3, tokenizers 1; one core of a Z80." in text
    assert "| v1 | 32,000 | 100,001 | 7 | 0 | 1.5 | 2.5 | 0.4 | not measured |" in text
    assert "| v2 | 32,000 | 100,001 | 7 | 0 | 1.5 | 2.5 | 0.4 | 1 + 1 / 3 |" in text
    lines = text.splitlines()
    assert lines[lines.index("| fault | v2 |") + 2 :] == ["| a | healed |", "| b\\|c | reported |", "| d | missed |"]


def test_the_committed_table_is_of_the_committed_results() -> None:
    written = ROOT / "docs" / "benchmarks"
    assert table(json.loads((written / "tokenizers.json").read_text())) == (written / "tokenizers.md").read_text()
