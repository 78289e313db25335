"""What the tests of the hosts share: a model folder, a child's environment, a manager with a recording plugin alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest

from integration_tests import child, tiny
from integration_tests.hosts.recorder import Recorder
from sloth_backend import autoload, manager

datasets.disable_progress_bars()
autoload.install()  # a no-op where torch has called it


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The only registered plugin, so that a test sees what the host adapter itself does."""
    monkeypatch.setattr(manager, "BUILTIN", ())
    manager.get_manager.cache_clear()
    plugin = Recorder()
    manager.get_manager().register(plugin, "recorder")
    yield plugin
    manager.get_manager.cache_clear()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a child process in which the package is installed."""
    return child.environment(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def lean(installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same, without packages that hosts can do without."""
    return child.without_optional(installed, tmp_path_factory.mktemp("lean"))
