"""Conversations to train on: from a file in one of the three usual layouts, or from the standard library."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sloth_backend.demo.docstrings import stdlib_pairs

Conversation = list[dict[str, str]]
"""Messages with a ``role`` (system, user or assistant) and a ``content``."""

HELD_OUT_EVERY = 20
HELD_OUT_AT_MOST = 128
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
LAYOUTS = (
    "'instruction' and 'output', optionally 'input' (Alpaca); 'messages' with 'role' and 'content'; "
    "or 'conversations' with 'from' and 'value' (ShareGPT)"
)


class DemoError(ValueError):
    """The run cannot be made as asked; the message is all that the user needs."""


@dataclass(frozen=True)
class Data:
    """What is trained on and what is kept back to measure on; ``source`` names where both come from."""

    source: str
    train: list[Conversation]
    held_out: list[Conversation]

    def describe(self) -> str:
        """``6,364 conversations from notes.jsonl, 318 of them held out``."""
        total = len(self.train) + len(self.held_out)
        return f"{total:,} conversations from {self.source}, {len(self.held_out)} of them held out"


def load(path: Path | None) -> Data:
    """The conversations of a jsonl file, or those made of the standard library's docstrings where ``path`` is None.

    Raises:
        DemoError: the file cannot be read, a line has no known layout, or there are fewer than two conversations.
    """
    if path is None:
        groups = [[_pair(*pair) for pair in pairs] for pairs in stdlib_pairs()]
        return split(groups, f"docstrings of Python {platform.python_version()}'s standard library")
    return split([[conversation] for conversation in read_jsonl(path)], str(path))


def split(groups: list[list[Conversation]], source: str) -> Data:
    """Hold out about 5% of the groups (1 to 128); the conversations of one group, about one thing, stay together."""
    if len(groups) < 2:
        raise DemoError(f"{source}: at least 2 conversations are needed, one of them to measure on; got {len(groups)}")
    every = min(max(HELD_OUT_EVERY, -(-len(groups) // HELD_OUT_AT_MOST)), len(groups))
    held_out = [item for n, group in enumerate(groups, 1) if n % every == 0 for item in group]
    train = [item for n, group in enumerate(groups, 1) if n % every for item in group]
    return Data(source, train, held_out)


def read_jsonl(path: Path) -> list[Conversation]:
    """The conversations of a file with one JSON object on each line; blank lines are passed over."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from None
    result = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                result.append(conversation(_parse(line)))
            except DemoError as error:
                raise DemoError(f"{path}, line {number}: {error}") from None
    return result


def conversation(row: Any) -> Conversation:
    """One row of a file as messages; the layout is told from its fields."""
    if not isinstance(row, dict):
        raise DemoError(f"expected one JSON object on each line, got {_kind(row)}")
    if "messages" in row:
        return _turns(row, "messages", "role", "content")
    if "conversations" in row:
        return _turns(row, "conversations", "from", "value")
    if "instruction" in row or "output" in row:
        question = _text(row, "instruction")
        context = _text(row, "input") if row.get("input") else ""
        return _pair(f"{question}\n\n{context}" if context else question, _text(row, "output"))
    raise DemoError(f"has the fields {', '.join(map(repr, row)) or '(none)'}; expected {LAYOUTS}")


def _turns(row: dict[str, Any], name: str, role_key: str, text_key: str) -> Conversation:
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise DemoError(f"field {name!r} must be a list of messages, got {_kind(turns)}")
    result = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DemoError(f"field {where!r} must be an object with {role_key!r} and {text_key!r}, got {_kind(turn)}")
        role = _text(turn, role_key, where)
        if role not in ROLES:
            raise DemoError(f"field '{where}.{role_key}' is {role!r}; expected one of {', '.join(ROLES)}")
        result.append({"role": ROLES[role], "content": _text(turn, text_key, where)})
    roles = [message["role"] for message in result]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise DemoError(f"field {name!r} has no message of the user that the assistant answers")
    return result


def _text(row: dict[str, Any], name: str, where: str = "") -> str:
    path = f"{where}.{name}" if where else name
    if name not in row:
        raise DemoError(f"field {path!r} is missing")
    if not isinstance(row[name], str):
        raise DemoError(f"field {path!r} must be a string, got {_kind(row[name])}")
    return row[name]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DemoError(f"is not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise DemoError(f"is not JSON ({error.msg}, column {error.colno}); expected one object on each line") from None


def _kind(value: Any) -> str:
    """A JSON value in words."""
    if value == []:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or f"the number {value}"


def _pair(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    """The contents of all messages, for training a tokenizer."""
    return (message["content"] for conversation in conversations for message in conversation)
