"""What ``sloth demo`` trains on: docstrings, three layouts of jsonl, errors that name line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sloth_backend.demo import data
from sloth_backend.demo.data import DemoError
from sloth_backend.demo.docstrings import MAX_ANSWER, clean, stdlib_pairs

ALPACA = {"instruction": "Name a slow animal.", "input": "", "output": "The sloth."}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a slow animal."},
        {"role": "assistant", "content": "The sloth."},
    ]
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Name a slow animal."}, {"from": "gpt", "value": "The sloth."}]
}
QUESTION, ANSWER = {"role": "user", "content": "Name a slow animal."}, {"role": "assistant", "content": "The sloth."}


def write(folder: Path, *rows: object) -> Path:
    """A jsonl file of ``rows``; strings and bytes go in as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture(scope="module")
def pairs() -> list[list[tuple[str, str]]]:
    return stdlib_pairs()


def test_the_library_gives_thousands_of_distinct_pairs(pairs: list[list[tuple[str, str]]]) -> None:
    flat = [pair for group in pairs for pair in group]
    questions, answers = zip(*flat, strict=True)
    assert len(flat) > 4000
    assert len(set(answers)) == len(answers)
    assert len(set(questions)) == len(questions)
    assert max(map(len, answers)) <= MAX_ANSWER + 2
    assert dict(flat)["What does the function `textwrap.fill` do?"].startswith("Fill a single paragraph of text")


def test_the_library_is_read_without_an_import(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text('"""Things that are slow."""\nraise SystemExit')
    (tmp_path / "package" / "_hidden.py").write_text('"""Nobody should read this."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "module.py").write_text(
        'class Sloth:\n    """Hangs from a tree."""\n'
        '    def climb(self, tree, *, speed=0.1):\n        """Climb up the tree.\n\n        It takes a while."""\n'
        '    def _sleep(self):\n        """Sleep for a long time."""\n'
        'def echo():\n    """Hangs from a tree."""\n'
        'def stub():\n    """Short."""\n'
    )
    assert stdlib_pairs(tmp_path) == [
        [("What is the class `module.Sloth`?", "Hangs from a tree.")],
        [
            ("What does the method `module.Sloth.climb` do?", "Climb up the tree."),
            ("Describe `module.Sloth.climb(self, tree, *, speed=0.1)`.", "Climb up the tree.\n\nIt takes a while."),
        ],
        [("What is the module `package` for?", "Things that are slow.")],
    ]


def test_doctests_and_tables_end_an_answer() -> None:
    assert clean("Add two\nnumbers.\n\nSlowly.\n\n>>> add(1, 2)\n3\n\nMore.") == ["Add two numbers.", "Slowly."]
    assert clean("Name   Age\n=====  ===\nAi     12") == []


def test_questions_about_one_thing_are_held_out_together() -> None:
    groups = [[[{"role": "user", "content": f"{group} {n}"}] for n in range(2)] for group in range(100)]
    result = data.split(groups, "test")
    names = [
        {conversation[0]["content"].split()[0] for conversation in part} for part in (result.train, result.held_out)
    ]
    assert not names[0] & names[1]
    assert (len(result.train), len(result.held_out)) == (190, 10)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ALPACA, [QUESTION, ANSWER]),
        (ALPACA | {"input": "In trees."}, [QUESTION | {"content": "Name a slow animal.\n\nIn trees."}, ANSWER]),
        ({"instruction": "Name a slow animal.", "output": "The sloth."}, [QUESTION, ANSWER]),
        (MESSAGES, [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]),
        (SHAREGPT, [QUESTION, ANSWER]),
    ],
)
def test_layouts_are_told_apart(row: object, expected: object) -> None:
    assert data.conversation(row) == expected


def test_blank_lines_and_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(ALPACA).encode(), "", SHAREGPT, "  \r", "")
    assert data.read_jsonl(path) == [[QUESTION, ANSWER]] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: is not JSON \(.*\); expected one object on each line"),
        (b"\xff", "line 2: is not UTF-8 at byte 1"),
        ("[]", "line 2: expected one JSON object on each line, got an empty list"),
        ("3", "line 2: expected one JSON object on each line, got the number 3"),
        ({"prompt": "x"}, r"line 2: has the fields 'prompt'; expected 'instruction' and 'output'.*ShareGPT"),
        ({}, r"line 2: has the fields \(none\); expected"),
        ({"instruction": "x"}, "line 2: field 'output' is missing"),
        ({"output": "x"}, "line 2: field 'instruction' is missing"),
        (ALPACA | {"output": 3}, "line 2: field 'output' must be a string, got the number 3"),
        (ALPACA | {"input": ["x"]}, "line 2: field 'input' must be a string, got a list"),
        ({"messages": []}, "line 2: field 'messages' must be a list of messages, got an empty list"),
        ({"messages": "hi"}, "line 2: field 'messages' must be a list of messages, got a string"),
        (
            {"messages": ["hi"]},
            r"line 2: field 'messages\[0\]' must be an object with 'role' and 'content', got a string",
        ),
        ({"messages": [{"role": "user"}]}, r"line 2: field 'messages\[0\].content' is missing"),
        ({"messages": [{"content": "x"}]}, r"line 2: field 'messages\[0\].role' is missing"),
        ({"messages": [QUESTION, ANSWER | {"content": None}]}, r"'messages\[1\].content' must be a string, got null"),
        ({"messages": [QUESTION | {"role": "tool"}]}, r"'messages\[0\].role' is 'tool'; expected one of system, user"),
        ({"messages": [QUESTION]}, "line 2: field 'messages' has no message of the user that the assistant answers"),
        ({"messages": [ANSWER, QUESTION]}, "field 'messages' has no message of the user that the assistant answers"),
        ({"conversations": [{"from": "human", "text": "x"}]}, r"field 'conversations\[0\].value' is missing"),
    ],
)
def test_errors_name_line_and_field(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=rf"data\.jsonl, .*{message}"):
        data.load(write(tmp_path, ALPACA, row))


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"at least 2 conversations are needed.*got 1"):
        data.load(write(tmp_path, ALPACA))
    with pytest.raises(DemoError, match=r"cannot read .*nothing\.jsonl: No such file"):
        data.load(tmp_path / "nothing.jsonl")
    with pytest.raises(DemoError, match=r"cannot read .*: Is a directory"):
        data.load(tmp_path)
