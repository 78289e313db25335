"""The plugin manager: what it refuses, what it blocks and prints, and what a failing plugin leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch

import sloth_backend
from integration_tests import tiny
from sloth_backend import Edits, Finding, SlothConfig, SlothConfigError, SlothPluginError, hookimpl
from sloth_backend.manager import BUILTIN, SlothManager, get_manager
from sloth_backend.run import Run

QUIET = SlothConfig(print_report=False)
RUN = Run("user", QUIET)


@pytest.fixture
def register() -> Iterator[Callable[[str, object], None]]:
    """Adds plugins to the process's manager for one test."""
    manager, names = get_manager(), []

    def add(name: str, plugin: object) -> None:
        manager.register(plugin, name)
        names.append(name)

    yield add
    for name in names:
        manager.pm.unregister(name=name)


def plugin(**hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin that answers the named hooks."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


def make_model() -> torch.nn.Module:
    """A tiny Llama."""
    return tiny.make_model(tiny.make_tokenizer())


def state(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every module, with copies of the tables in which modules keep their parameters."""

    def copied(value: object) -> object:
        return dict(value) if isinstance(value, dict) else value

    return {name: {key: copied(value) for key, value in vars(m).items()} for name, m in model.named_modules()}


def test_misspelt_hook_is_refused() -> None:
    manager = SlothManager()
    manager.register(plugin(sloth_pach_model=lambda model: None), "third")
    with pytest.raises(pluggy.PluginValidationError, match=r"unknown hook 'sloth_pach_model' in plugin.*third"):
        manager.pm.check_pending()


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(pluggy.PluginValidationError, match=r"(?s)third.*sloth_patch_model.*modle") as caught:
        SlothManager().register(plugin(sloth_patch_model=lambda modle: None), "third")
    assert "model" in str(caught.value)


def test_builtins_are_registered_in_their_order() -> None:
    assert [name for name in reversed(get_manager().names()) if name in BUILTIN] == list(BUILTIN)


def test_disable_keeps_plugins_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTH_DISABLE", "tokenizer_healing, embedding_fix")
    names = get_manager.__wrapped__().names()
    assert {"kernel_patching", "offloaded_checkpointing"} <= set(names)
    assert not {"tokenizer_healing", "embedding_fix"} & set(names)


@pytest.mark.parametrize(("value", "traced"), [("1", True), ("", False)])
def test_trace_prints_every_hook_call(
    value: str, traced: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLOTH_TRACE", value)
    get_manager.__wrapped__().check(RUN, None)
    printed = capsys.readouterr().err
    assert ("sloth_check [hook]" in printed) == traced
    assert ("finish sloth_check" in printed) == traced


def test_object_plugins_get_the_arguments_they_name() -> None:
    class Plugin:
        seen = None

        @hookimpl
        def sloth_check(self, run: Run) -> list[str]:
            self.seen = run
            return ["too slow"]

    manager, instance = SlothManager(), Plugin()
    manager.register(instance, "object")
    assert manager.check(RUN, None) == ["too slow"]
    assert instance.seen is RUN


def test_problems_of_all_plugins_are_raised_together(register: Callable[[str, object], None]) -> None:
    register("one", plugin(sloth_check=lambda: ["first problem"]))
    register("two", plugin(sloth_check=lambda: ["second problem"]))
    model = make_model()
    before = state(model)
    with pytest.raises(SlothConfigError, match=r"(?s)2 problems.*first problem") as caught:
        sloth_backend.optimize(model, config=QUIET)
    assert sorted(caught.value.problems) == ["first problem", "second problem"]
    assert state(model) == before


def _fails_after_an_edit(model: torch.nn.Module, edits: Edits) -> list[Finding]:
    edits.set(model, "left_behind", True)
    raise ZeroDivisionError("no layers")


def _fails_once_all_is_patched(report: object) -> None:
    raise ZeroDivisionError("no layers")


@pytest.mark.parametrize(
    ("hook", "function"),
    [
        ("sloth_fix_embeddings", _fails_after_an_edit),
        ("sloth_patch_model", _fails_after_an_edit),
        ("sloth_report", _fails_once_all_is_patched),
    ],
)
def test_a_failing_plugin_is_named_and_leaves_the_model_as_it_was(
    hook: str, function: Callable[..., Any], register: Callable[[str, object], None]
) -> None:
    model = make_model()
    before = state(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    register("clumsy", plugin(**{hook: function}))
    with pytest.raises(SlothPluginError) as caught:
        sloth_backend.optimize(model, config=QUIET)
    assert f"plugin 'clumsy' failed in {hook}: ZeroDivisionError: no layers" in str(caught.value)
    assert "SLOTH_DISABLE=clumsy" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert state(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_findings_are_signed(register: Callable[[str, object], None]) -> None:
    register("chatty", plugin(sloth_patch_model=lambda model: [Finding("warned", "model", "it is late")]))
    model = sloth_backend.optimize(make_model(), config=QUIET)
    assert Finding("warned", "model", "it is late", plugin="chatty") in sloth_backend.report(model).findings
