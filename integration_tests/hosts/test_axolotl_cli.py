"""Axolotl's command line: a YAML with the switch alone, in processes that import nothing of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")

from safetensors.torch import load_file
from yaml import safe_load

from integration_tests.docs.snippets import command, snippet
from integration_tests.hosts.axolotl_runs import STOCK, options, write

QUIET = {"AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
BIN = Path(sys.executable).parent


def axolotl(environment: dict[str, str], *arguments: object, typed: str = "", folder: Path | str = "/") -> str:
    """What a command of Axolotl prints that is given in ``folder``; it must succeed."""
    path = f"{BIN}:{environment['PATH']}"
    given = [str(BIN / "axolotl"), *map(str, arguments)]
    result = subprocess.run(
        given, env={**environment, **QUIET, "PATH": path}, capture_output=True, text=True, cwd=folder, input=typed
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


@pytest.mark.parametrize("launcher", [["--launcher", "python"], pytest.param([], marks=pytest.mark.slow)], ids=str)
def test_the_switch_alone_is_enough(
    launcher: list[str], installed: dict[str, str], model_folder: Path, tmp_path: Path
) -> None:
    """The README's command, with the line of the page in the file that it names."""
    path = tmp_path / "my.yml"
    write(path, {**options(tmp_path, model_folder), **safe_load(snippet("docs/hosts-axolotl.md", "use_unsloth:"))})
    program, *arguments = command("README.md", "axolotl train").split()
    output = axolotl(installed, *arguments, *launcher, folder=tmp_path)
    assert program == "axolotl"
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


TWO = ["--launcher", "torchrun", "--", "--standalone", "--nproc_per_node", "2"]
ON_CPUS = {"ACCELERATE_USE_CPU": "true"}
"""Without it accelerate takes two processes that see no GPU for two runs."""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="Axolotl asks a PyTorch that is built for GPUs how they are linked, and there are none",
)
def test_two_processes_train_one_model(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    """DDP over gloo. All weights are trained, so that no adapters are drawn, by SGD, which roundings do not turn."""
    # On CPUs Axolotl would place the model by its rank, as on the GPU of that number.
    full = dict.fromkeys(("adapter", "lora_r", "lora_alpha", "lora_target_linear"))
    given = {**full, "max_memory": {"cpu": "4GiB"}, "optimizer": "sgd", "learning_rate": 0.1}
    outputs, weights = [], []
    for name, switch in (("stock", {}), ("ours", {"use_unsloth": True})):
        (tmp_path / name).mkdir()
        config = yaml(tmp_path / name, model_folder, **given, **switch)
        outputs.append(axolotl({**installed, **ON_CPUS}, "train", config, *TWO))
        weights.append(load_file(tmp_path / name / "out" / "model.safetensors"))
    assert "sloth_backend ·" not in outputs[0]
    assert_switched_on(outputs[1])
    assert len(losses(outputs[0])) == 3  # what each of two runs would print
    assert losses(outputs[1]) == pytest.approx(losses(outputs[0]), rel=1e-3)
    before = load_file(model_folder / "model.safetensors")
    for name, stock in weights[0].items():
        assert not torch.equal(stock, before[name])
        torch.testing.assert_close(weights[1][name], stock, rtol=0, atol=1e-5 * stock.abs().max().item())


@pytest.mark.slow
def test_torchrun_launches_the_same(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    config = yaml(tmp_path, model_folder, use_sloth=True)
    arguments = ["--launcher", "torchrun", "--", "--nproc_per_node", "1"]
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
def test_evaluate(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    found = []
    for switch in (STOCK, {"use_unsloth": True}):
        config = yaml(tmp_path, model_folder, val_set_size=0.2, **switch)
        output = axolotl(installed, "evaluate", config, "--launcher", "python")
        found.append([float(value) for value in re.findall(r"eval_loss\W+([\d.]+)", output)])
        assert ("sloth_backend ·" in output) is (switch is not STOCK)
    assert found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_the_plugin_by_name_does_without_autoload(
    installed: dict[str, str], model_folder: Path, tmp_path: Path
) -> None:
    without = {**installed, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    config = yaml(tmp_path, model_folder, **safe_load(snippet("docs/hosts-axolotl.md", "plugins:")))
    assert_switched_on(axolotl(without, "train", config, "--launcher", "python"))
