"""The ``sloth`` command as a user calls it; training runs are a few steps long."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import sloth_backend
from integration_tests import child, tiny
from sloth_backend.cli import app

PNG = b"\x89PNG\r\n\x1a\n"


def sloth(*arguments: object) -> Result:
    """Run the command in this process, at the width of a wide terminal."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """The message of a refused run: exit code 2, on standard error, without a traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection leaves this machine: any attempt fails the test."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"What does {word} mean?", "output": f"It means {word}."} for word in tiny.WORDS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_version_is_quick_and_right(tmp_path: Path) -> None:
    script = "import sys, sloth_backend.cli; print({'torch', 'transformers', 'trl', 'matplotlib'} & set(sys.modules))"
    assert child.run(script, child.environment(tmp_path)).stdout.strip() == "set()"
    assert sloth("--version").stdout.strip() == f"sloth-backend {sloth_backend.__version__}"


def test_demo_from_docstrings_to_picture(tmp_path: Path, offline: None) -> None:
    result = sloth("demo", "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "docstrings of Python" in result.stdout
    assert "linear_cross_entropy" in result.stdout
    assert "a held-out question" in result.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [step for step, _ in run["train"]] == [1, 2]
    assert [step for step, _ in run["held_out"]] == [0, 1, 2]
    assert run["held_out"][-1][1] < run["held_out"][0][1]
    assert run["report"]["counts"]["changed"] >= 10
    assert len(run["seconds"]) == 2


@pytest.fixture
def lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started import less."""
    folder = tmp_path / "lean"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", child.without_optional(os.environ, folder)["PYTHONPATH"])


@pytest.mark.usefixtures("lean")
def test_compare_trains_the_given_model_with_and_without(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    options = ("--model", model_folder, "--data", data_file, "--steps", 3, "--seed", 1, "--out", tmp_path / "out")
    result = sloth("demo", *options, "--compare")
    assert result.exit_code == 0, result.output
    assert "stock TRL" in result.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ours, stock = metrics["runs"]
    assert [run["settings"]["backend"] for run in (ours, stock)] == [True, False]
    assert ours["report"]["counts"]["changed"] > 0
    assert stock["report"]["findings"] == []
    assert len(ours["train"]) == len(stock["train"]) == 3
    assert metrics["max_loss_difference"] == max(
        abs(a - b) for (_, a), (_, b) in zip(ours["train"], stock["train"], strict=True)
    )
    assert metrics["max_loss_difference"] < 1e-4
    assert all(run["peak_bytes"] > 2**27 for run in (ours, stock))
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG)
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()


def test_bad_data_is_refused_with_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n')
    message = error_of(sloth("demo", "--data", path, "--out", tmp_path / "out"))
    assert message == f"error: {path}, line 2: field 'output' is missing"
    assert not (tmp_path / "out").exists()


def test_missing_file_and_bad_steps_are_refused(tmp_path: Path) -> None:
    assert "nothing.jsonl: No such file" in error_of(sloth("demo", "--data", tmp_path / "nothing.jsonl"))
    assert "--steps" in error_of(sloth("demo", "--steps", 0))


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("here first")
    assert "cannot make this folder" in error_of(sloth("demo", "--out", tmp_path / "out"))


def test_model_that_is_not_there_is_refused(tmp_path: Path, data_file: Path) -> None:
    message = error_of(sloth("demo", "--model", tmp_path / "none", "--data", data_file, "--out", tmp_path / "out"))
    assert "--model" in message
    assert "cannot be loaded as a causal language model" in message


def test_doctor_finds_this_machine_usable() -> None:
    result = sloth("doctor", "--json")
    assert result.exit_code == 0, result.output
    sections = json.loads(result.stdout)["sections"]
    lines = {name: {line["name"]: line for line in section} for name, section in sections.items()}
    assert lines["versions"]["torch"]["state"] == "ok"
    assert "supported: 2.11 to 2.15" in lines["versions"]["torch"]["detail"]
    assert "sloth_patch_model" in lines["plugins"]["kernel_patching"]["detail"]
    assert set(lines["ops"]) >= {"rms_norm", "rope", "glu", "linear_cross_entropy"}
    assert all("agrees with its reference" in line["detail"] for line in lines["ops"].values())
    assert "runs on glu" in lines["roles"]["glu"]["detail"]
    assert lines["trial"]["linear_cross_entropy"]["state"] == "ok"
    assert lines["hosts"]["axolotl"]["state"] == "inactive"


def test_doctor_prints_a_table_for_people() -> None:
    result = sloth("doctor")
    assert "sloth_backend is usable" in result.stdout
    assert "kernel_patching" in result.stdout
