"""Axolotl's command line: a YAML with the switch alone, in processes that import nothing of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

from integration_tests.hosts.axolotl_runs import STOCK, options, write
from sloth_backend.hosts.axolotl_config import PLUGIN

QUIET = {"AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
BIN = Path(sys.executable).parent


def axolotl(environment: dict[str, str], *arguments: object, typed: str = "") -> str:
    """What a command of Axolotl prints; it must succeed."""
    path = f"{BIN}:{environment['PATH']}"
    command = [str(BIN / "axolotl"), *map(str, arguments)]
    result = subprocess.run(
        command, env={**environment, **QUIET, "PATH": path}, capture_output=True, text=True, cwd="/", input=typed
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def losses(output: str) -> list[float]:
    """The losses that a run has printed, four digits each."""
    return [float(value) for value in re.findall(r"'loss': '([\d.]+)'", output)]


def assert_switched_on(output: str, times: int = 1) -> None:
    """The report was printed, with both layers in it."""
    assert output.count("sloth_backend · axolotl, cpu, float32") == times, output[-3000:]
    assert output.count("2 × model.layers.*") >= times


def yaml(folder: Path, model: Path, **changes: Any) -> Path:
    """A configuration in ``folder``."""
    return write(folder / "run.yml", options(folder, model, **changes))


def test_the_switch_alone_is_enough(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    config = yaml(tmp_path, model_folder, use_unsloth=True)
    output = axolotl(installed, "train", config, "--launcher", "python")
    assert_switched_on(output)
    assert len(losses(output)) == 3


@pytest.mark.slow
def test_accelerate_launches_the_same(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    ours = axolotl(installed, "train", yaml(tmp_path, model_folder, use_sloth=True))
    assert_switched_on(ours)
    stock = axolotl(installed, "train", yaml(tmp_path, model_folder, **STOCK))
    assert "sloth_backend" not in stock
    assert losses(ours) == pytest.approx(losses(stock), abs=2e-3)  # adapters are drawn anew, and B begins at zero
    merged = axolotl(installed, "merge-lora", yaml(tmp_path, model_folder, use_sloth=True))
    assert "merged" in merged
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_launches_the_same(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    config = yaml(tmp_path, model_folder, use_sloth=True)
    arguments = ["--launcher", "torchrun", "--", "--nproc_per_node", "1"]  # on CPUs Axolotl loads no model in two
    output = axolotl(installed, "train", config, *arguments)
    assert_switched_on(output)


@pytest.mark.slow
def test_preprocess_and_inference(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    config = yaml(tmp_path, model_folder, use_unsloth=True)
    assert "Success! Preprocessed data path" in axolotl(installed, "preprocess", config)
    axolotl(installed, "train", config, "--launcher", "python")
    adapter = ["--lora-model-dir", tmp_path / "out", "--launcher", "python"]
    assert "=" * 40 in axolotl(installed, "inference", config, *adapter, typed="the quick\n")


@pytest.mark.slow
def test_the_plugin_by_name_does_without_autoload(
    installed: dict[str, str], model_folder: Path, tmp_path: Path
) -> None:
    without = {**installed, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    config = yaml(tmp_path, model_folder, plugins=[PLUGIN])
    assert_switched_on(axolotl(without, "train", config, "--launcher", "python"))
