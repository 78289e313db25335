"""An instruction set out of what every Python carries with it: the docstrings of its standard library."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})
MAX_ANSWER = 160
"""Longest answer in characters: whole paragraphs are kept as long as they fit."""

QUESTIONS = {
    "module": ("What is the module `{name}` for?", "Describe the module `{name}`."),
    "class": ("What is the class `{name}`?", "Describe the class `{name}`."),
    "method": ("What does the method `{name}` do?", "Describe `{name}{signature}`."),
    "function": ("What does the function `{name}` do?", "Describe `{name}{signature}`."),
}
"""Kind -> the question answered by the first paragraph, and the one answered by the whole docstring."""


@dataclass(frozen=True)
class Documented:
    """One documented thing of the library: ``kind`` is a key of ``QUESTIONS``, ``name`` is dotted."""

    kind: str
    name: str
    signature: str
    doc: str


def stdlib_pairs(root: Path | None = None) -> list[list[tuple[str, str]]]:
    """(question, answer) pairs from the sources under ``root`` (default: the running Python's library).

    Pairs about one thing stand together in one list. Sources are parsed, never imported. The order is that of the
    file names and of the definitions in them, the same in every run; no question and no answer comes twice.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    groups = []
    for item in (item for path in sources(root) for item in documented(path, module_name(root, path))):
        group = [pair for pair in questions(item) if seen.isdisjoint(pair)]
        seen.update(text for pair in group for text in pair)
        if group:
            groups.append(group)
    return groups


def sources(root: Path) -> list[Path]:
    """The library's public modules below ``root``, sorted."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith("_") and part not in ("__init__.py", "__future__.py") for part in parts)
        if not hidden and SKIPPED_FOLDERS.isdisjoint(parts):
            found.append(path)
    return found


def module_name(root: Path, path: Path) -> str:
    """``json/decoder.py`` -> ``json.decoder``, ``json/__init__.py`` -> ``json``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def documented(path: Path, module: str) -> Iterator[Documented]:
    """The public modules, classes, functions and methods with a docstring in one source file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    if doc := ast.get_docstring(tree):
        yield Documented("module", module, "", doc)
    yield from _members(tree, module, "function")


def _members(parent: ast.Module | ast.ClassDef, prefix: str, kind: str) -> Iterator[Documented]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{node.name}", ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield Documented("class", name, "", doc)
            yield from _members(node, name, "method")
        elif doc:
            yield Documented(kind, name, f"({ast.unparse(node.args)})", doc)


def questions(item: Documented) -> Iterator[tuple[str, str]]:
    """The pairs that one docstring gives: a short one from its first paragraph, and one from all of it."""
    paragraphs = clean(item.doc)
    if not paragraphs or len(paragraphs[0].split()) < 3:
        return
    short, whole = QUESTIONS[item.kind]
    yield short.format(name=item.name), paragraphs[0]
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) > MAX_ANSWER:
            break
        answer += "\n\n" + paragraph
    if answer != paragraphs[0]:
        yield whole.format(name=item.name, signature=item.signature), answer


def clean(doc: str) -> list[str]:
    """A docstring's paragraphs of prose on one line each; doctests, tables, drawings and long paragraphs end it."""
    result = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        text = " ".join(block.split())
        if not re.match(r"[A-Z`'\"][^>]", text) or len(text) > MAX_ANSWER or re.search(r">>>|[-=*_#+.]{4}|\||:$", text):
            break
        result.append(text)
    return result
