"""The README's first screen, run as it stands beside folders that have the names of what it takes from the hub.

Its other two commands are run by ``test_axolotl_cli`` and ``test_accelerate_launch``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import sloth_backend
from integration_tests import tiny
from integration_tests.docs.snippets import command, snippet
from integration_tests.downstream.standins import train_on_cpu

MODEL, DATA = "meta-llama/Llama-3.2-1B", "trl-lib/Capybara"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a model and rows of the README's names."""
    tiny.save(tmp_path / MODEL)
    (tmp_path / DATA).mkdir(parents=True)
    tiny.write_jsonl(tmp_path / DATA / "train.jsonl", "messages")
    return tmp_path


def test_trl_s_command(lean: dict[str, str], folder: Path) -> None:
    line = command("README.md", "trl sft")
    on_cpu = "--output_dir out --use_cpu true --bf16 false --report_to none --max_steps 2 --use_peft true"
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**lean, "PATH": path, "HF_HOME": str(folder / "cache")}
    shell = ["bash", "-c", f"{line} {on_cpu}"]
    result = subprocess.run(shell, env=environment, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "sloth_backend · trl, cpu, float32" in result.stderr
    assert "linear_cross_entropy" in result.stderr
    assert (folder / "out" / "adapter_model.safetensors").exists()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give configurations the ``use_cpu`` without which TRL's default of bf16 is refused here."""
    arguments = transformers.TrainingArguments
    monkeypatch.setattr(arguments, "__post_init__", arguments.__post_init__)
    train_on_cpu()


@pytest.mark.usefixtures("on_cpu")
def test_the_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"dataset": tiny.make_dataset("messages", 8)}
    exec(snippet("README.md", "from trl import SFTConfig, SFTTrainer"), names)
    report = sloth_backend.report(names["trainer"].model)
    assert [f.subject for f in report.of(action="changed", capability="layer_program")] == tiny.LAYERS
    assert names["trainer"].state.global_step == 3


def test_a_loop_of_one_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.make_tokenizer()
    model, untouched = tiny.make_model(tokenizer), tiny.make_model(tokenizer)
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    exec(snippet("README.md", "import sloth_backend"), names)
    assert names["model"] is model
    assert "layer_program" in capsys.readouterr().out
    assert tiny.describe(model) == tiny.describe(untouched)
