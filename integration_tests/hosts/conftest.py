"""What the tests of the hosts share: a model folder, its parts, and a manager with nothing but a recording plugin."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest

from integration_tests import tiny
from sloth_backend import autoload, hookimpl, manager
from sloth_backend.findings import Edits, Finding

datasets.disable_progress_bars()
autoload.install()  # a no-op where torch has called it


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@dataclass
class Recorder:
    """A plugin that notes the phases, changes one attribute in each, and fails where told to."""

    calls: list[str] = field(default_factory=list)
    fail_in: str = ""
    problems: list[str] = field(default_factory=list)
    on_tokenizer: Callable[[Any], None] = lambda tokenizer: None
    model: Any = None

    def note(self, hook: str, target: Any, edits: Edits) -> list[Finding]:
        """Leave a mark on ``target`` and a Finding, or fail."""
        self.calls.append(hook)
        edits.set(target, f"_mark_of_{hook}", True)
        if self.fail_in == hook:
            raise ArithmeticError("as told")
        return [Finding("changed", hook, "marked")]

    @hookimpl
    def sloth_check(self, run: Any) -> list[str]:
        """The problems it was given."""
        return self.problems

    @hookimpl
    def sloth_heal_tokenizer(self, tokenizer: Any, edits: Edits) -> list[Finding]:
        """Phase A."""
        self.on_tokenizer(tokenizer)
        return self.note("heal", tokenizer, edits)

    @hookimpl
    def sloth_fix_embeddings(self, model: Any, edits: Edits) -> list[Finding]:
        """Phase B."""
        self.model = model
        return self.note("fix", model, edits)

    @hookimpl
    def sloth_patch_model(self, model: Any, edits: Edits) -> list[Finding]:
        """Phase C."""
        return self.note("patch", model, edits)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The only registered plugin, so that a test sees what the host adapter itself does."""
    monkeypatch.setattr(manager, "BUILTIN", ())
    manager.get_manager.cache_clear()
    plugin = Recorder()
    manager.get_manager().register(plugin, "recorder")
    yield plugin
    manager.get_manager.cache_clear()
