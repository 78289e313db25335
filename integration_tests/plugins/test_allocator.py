"""Growing segments: on for a CUDA device until undo, never against what the user has said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits
from sloth_backend.run import Run
from sloth_plugins import allocator

RUN = Run("user", SlothConfig(), device=torch.device("cuda", 0))


class Settings:
    """The two functions of torch's that the plugin uses."""

    def __init__(self, current: str) -> None:
        self.current = current

    def _accelerator_getAllocatorSettings(self) -> str:
        return self.current

    def _accelerator_setAllocatorSettings(self, settings: str) -> None:
        self.current = settings


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("before", ["", "max_split_size_mb:512", "max_split_size_mb:512,expandable_segments:False"])
def test_on_until_undo_and_other_settings_stay(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, edits = Settings(before), Edits()
    monkeypatch.setattr(allocator, "C", settings)
    (finding,) = allocator.sloth_patch_model(RUN, edits)
    others = [part for part in before.split(",") if "segments" not in part and part]
    assert finding.action == "changed"
    assert settings.current.split(",") == [*others, "expandable_segments:True"]
    assert allocator.sloth_patch_model(RUN, Edits()) == []
    edits.rollback()
    assert settings.current.split(",") == [*others, "expandable_segments:False"]


@pytest.mark.parametrize("said", ["expandable_segments:False", "backend:cudaMallocAsync"])
def test_what_the_user_says_holds(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(said)
    monkeypatch.setattr(allocator, "C", settings)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
    (finding,) = allocator.sloth_patch_model(RUN, Edits())
    assert finding.action == "skipped"
    assert said in finding.reason
    assert settings.current == said


def test_other_devices_have_no_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "C", None)
    assert allocator.sloth_patch_model(replace(RUN, device=torch.device("cpu")), Edits()) == []


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    bare: Any = object()
    monkeypatch.setattr(allocator, "C", bare)
    (finding,) = allocator.sloth_patch_model(RUN, Edits())
    assert finding.action == "skipped"
