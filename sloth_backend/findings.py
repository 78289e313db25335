"""What happened to a model, in words (Finding, Report) and in reverse (Edits)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Action = Literal["changed", "skipped", "warned"]
_ABSENT = object()


@dataclass(frozen=True)
class Finding:
    """One thing that was changed, left alone, or is worth knowing.

    Attributes:
        action: ``changed`` (a fast path or a fix is in place), ``skipped`` (left alone, ``reason`` says why) or
            ``warned`` (nothing to do for us, something for the user).
        subject: what it is about: a module's dotted name, ``tokenizer.pad_token``, ``loss``...
        reason: what was done, or why not, in one sentence.
        capability: the op or feature concerned, such as ``rms_norm``; groups the report.
        plugin: the plugin that said so; the caller of its hook fills it in.
    """

    action: Action
    subject: str
    reason: str
    capability: str = ""
    plugin: str = ""

    def by(self, plugin: str) -> Finding:
        """This finding, signed by ``plugin`` unless it is signed already."""
        return self if self.plugin else replace(self, plugin=plugin)


@dataclass(frozen=True)
class Report:
    """All findings of one model's run; ``str`` is a table for people, ``to_dict`` is for programs."""

    findings: tuple[Finding, ...] = ()
    run: str = ""

    def of(self, *, action: Action | None = None, capability: str | None = None) -> list[Finding]:
        """The findings of one action, one capability, or both."""
        return [f for f in self.findings if action in (None, f.action) and capability in (None, f.capability)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``run``, ``counts`` by action, and ``findings`` as dictionaries."""
        counts = Counter(f.action for f in self.findings)
        return {"run": self.run, "counts": dict(counts), "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        from sloth_backend.table import render

        return render(self)


@dataclass
class Edits:
    """Every change made to a model or tokenizer, so that all of them can be taken back in reverse order."""

    _undo: list[Callable[[], None]] = field(default_factory=list)

    def set(self, target: Any, name: str, value: object) -> None:
        """Set ``target.name`` on the instance and remember what its ``__dict__`` held before.

        Modules and parameters held in ``nn.Module``'s own tables are not attributes in this sense: parameters
        are never replaced.
        """
        before = vars(target).get(name, _ABSENT)
        setattr(target, name, value)

        def restore() -> None:
            if before is _ABSENT:
                vars(target).pop(name, None)
            else:
                vars(target)[name] = before

        self._undo.append(restore)

    def remove(self, target: Any, name: str) -> None:
        """Drop the instance attribute ``target.name``, so that the class's own shows again."""
        before = vars(target).pop(name)
        self._undo.append(lambda: vars(target).__setitem__(name, before))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Register how to take back a change that is no attribute (rows of a weight, a token...)."""
        self._undo.append(action)

    def mark(self) -> int:
        """A point to roll back to."""
        return len(self._undo)

    def rollback(self, mark: int = 0) -> None:
        """Take back everything done since ``mark``, last change first."""
        while len(self._undo) > mark:
            self._undo.pop()()


def sign(findings: Iterable[Finding] | None, plugin: str) -> list[Finding]:
    """A plugin's answer as a list of findings signed with its name."""
    return [finding.by(plugin) for finding in findings or ()]


def summarize(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """Findings that differ only in their subject, folded into one with their count, in order of first appearance."""
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.plugin, finding.capability, finding.action, finding.reason)
        groups.setdefault(key, []).append(finding)
    return [(members[0], len(members)) for members in groups.values()]
