"""Snippets of the documentation, for the tests that run them; ``test_docs`` asks for a test of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the language that its fence names, and its text."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines, without comments."""
        lines = (re.sub(r"(^|\s+)#.*", "", line) for line in self.text.splitlines())
        return [line for line in lines if line]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, whose path is that in the repository."""
    return [Block(*found) for found in FENCED.findall((ROOT / page).read_text(encoding="utf-8"))]


def snippet(page: str, begins: str) -> str:
    """The one block of a page that begins so."""
    return _only(page, begins, [block.text for block in blocks(page)])


def command(page: str, begins: str) -> str:
    """The one line of the page's ``bash`` blocks that begins so, without its comment."""
    return _only(page, begins, [line for block in blocks(page) if block.language == "bash" for line in block.commands])


def _only(page: str, begins: str, texts: list[str]) -> str:
    (found,) = [text for text in texts if text.startswith(begins)]
    return found
