"""A plugin for tests of host adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sloth_backend import hookimpl
from sloth_backend.findings import Edits, Finding

PHASES = ["heal", "fix", "patch"]
"""What a Recorder's calls are when all phases ran."""


@dataclass
class Recorder:
    """A plugin that notes the phases, changes one attribute in each, and fails where told to."""

    calls: list[str] = field(default_factory=list)
    fail_in: str = ""
    problems: list[str] = field(default_factory=list)
    on_tokenizer: Callable[[Any], None] = lambda tokenizer: None
    on_model: Callable[[Any], None] = lambda model: None
    fixed: Any = None
    had_adapters: bool = False
    run: Any = None

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
        self.fixed, self.had_adapters = model, "lora_" in str(model)
        return self.note("fix", model, edits)

    @hookimpl
    def sloth_patch_model(self, model: Any, run: Any, edits: Edits) -> list[Finding]:
        """Phase C."""
        self.run = run
        findings = self.note("patch", model, edits)
        self.on_model(model)
        return findings
