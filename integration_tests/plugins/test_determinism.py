"""The option that makes runs repeat to the bit: torch's own switch, for as long as the model is switched on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from sloth_kernels.ops import attention


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def switched_on(deterministic: bool = True) -> torch.nn.Module:
    model = tiny.make_model(tiny.make_tokenizer())
    return sloth_backend.optimize(model, config={"deterministic": deterministic, "print_report": False})


def switch() -> tuple[bool, bool, bool]:
    memory: Any = torch.utils.deterministic
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, memory.fill_uninitialized_memory


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_it_is_on_until_undo(before: tuple[bool, bool]) -> None:
    enabled, warns = before
    torch.use_deterministic_algorithms(enabled, warn_only=warns)
    was = switch()
    model = switched_on()
    assert switch() == (True, not enabled or warns, False), "who asked for errors keeps them"
    (found,) = sloth_backend.report(model).of(action="changed", capability="deterministic")
    assert "for this process" in found.reason
    sloth_backend.undo(model)
    assert switch() == was


def test_without_the_option_nothing_is_touched() -> None:
    was = switch()
    model = switched_on(deterministic=False)
    assert switch() == was
    assert not sloth_backend.report(model).of(capability="deterministic")


def test_attention_chooses_anew() -> None:
    """A kernel that was chosen for a form of call before may sum in any order."""
    q = torch.randn(1, 2, 5, 8)
    spec = attention.AttentionSpec(scale=1.0)
    attention.choose(q, q, q, None, spec)
    before = len(attention._CHOSEN)
    switched_on()
    attention.choose(q, q, q, None, spec)
    attention.choose(q, q, q, None, spec)
    assert len(attention._CHOSEN) > before
