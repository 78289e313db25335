"""The example, unmodified, under Accelerate's and torch's launchers, and what ``python -m sloth_backend`` runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration_tests import tiny
from integration_tests.child import lines
from integration_tests.docs.snippets import command
from integration_tests.hosts.accelerate_runs import EXAMPLE, LAYERS, make_accelerator, switched
from sloth_backend import __main__ as entry

STEPS = 3
PREFIX = "base_model.model."
REPORTER = """
    import json, os
    from sloth_backend import hookimpl
    @hookimpl
    def sloth_report(report):
        with open(os.path.join(os.environ["REPORTS"], os.environ.get("RANK", "0") + ".json"), "w") as file:
            json.dump(report.to_dict(), file)
"""
PROBE = """
    import json, multiprocessing, os, sys
    import beside
    def loud():
        raise LookupError("in the script")
    if __name__ == "__main__":
        assert sys.modules["__main__"].loud is loud
        print(json.dumps([sys.argv[1:], os.path.samefile(sys.argv[0], __file__), os.environ["SLOTH_BACKEND"]]))
        loud()
"""


@pytest.fixture(scope="module")
def environment(lean: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process in which the package is installed, and beside it a plugin that keeps reports."""
    site = tmp_path_factory.mktemp("reporter")
    (site / "reporter.py").write_text(lines(REPORTER))
    info = site / "reporter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reporter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sloth_backend]\nreporter = reporter\n")
    scripts = os.path.dirname(sys.executable)
    path = {"PATH": os.pathsep.join([scripts, os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
    return {**lean, **path, "PYTHONPATH": os.pathsep.join([str(site), lean["PYTHONPATH"]])}


@pytest.fixture(scope="module")
def arguments(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the example needs, for adapters and passes of two rows."""
    data = tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", count=20)
    sizes = ["--batch_size", "2", "--max_steps", str(STEPS), "--lr", "1e-2", "--lora", "--cpu"]
    return ["--model", str(model_folder), "--data", str(data), *sizes]


@pytest.fixture(scope="module")
def stock(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the example without the switch, two passes a step."""
    return run_here(arguments, tmp_path_factory.mktemp("stock"))


def run_here(arguments: list[str], folder: Path) -> list[float]:
    make_accelerator()
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch, switched(None):
        patch.setattr(sys, "argv", [str(EXAMPLE), *arguments, "--output_dir", str(folder), *TWO_PASSES])
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return losses("\n".join(printed))


TWO_PASSES = ["--gradient_accumulation_steps", "2"]


def losses(printed: str) -> list[float]:
    """Those of each step and of the evaluation."""
    found = [float(number) for number in re.findall(r"^(?:step \d+|evaluation): loss (\S+)$", printed, re.MULTILINE)]
    assert len(found) == STEPS + 1, printed
    return found


def launch(command: list[str], environment: dict[str, str], folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """The losses that a launched example printed, and the report of each rank."""
    environment = {**environment, "REPORTS": str(folder)}
    command = [*command, "--output_dir", str(folder / "out"), "--checkpointing_steps", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "out" / "step_2").is_dir()
    assert (folder / "out" / "adapter_config.json").exists()
    return losses(done.stdout), [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def changed(report: dict[str, Any], capability: str) -> list[str]:
    findings = [f for f in report["findings"] if (f["action"], f["capability"]) == ("changed", capability)]
    return [f["subject"].removeprefix(PREFIX) for f in findings]


PAGE_COMMANDS = [
    command("docs/hosts-accelerate.md", "SLOTH_BACKEND='{"),
    *(
        pytest.param(line, marks=pytest.mark.slow)
        for line in (
            command("README.md", "SLOTH_BACKEND=1 accelerate launch train.py"),
            command("docs/hosts-accelerate.md", "SLOTH_BACKEND=1 accelerate launch"),
            command("docs/hosts-accelerate.md", "accelerate launch -m sloth_backend"),
        )
    ),
]


@pytest.mark.parametrize("line", PAGE_COMMANDS)
def test_the_example_as_the_documentation_launches_it(
    line: str, stock: list[float], arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copy(EXAMPLE, tmp_path / "train.py")
    ours, reports = launch(["bash", "-c", f'{line} "$@"', "bash", *arguments, *TWO_PASSES], environment, tmp_path)
    assert ours == pytest.approx(stock, rel=1e-5)
    assert [changed(report, "layer_program") for report in reports] == [LAYERS]
    assert reports[0]["run"] == "accelerate, cpu, float32"


def test_two_processes_have_the_losses_of_one(
    stock: list[float], arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """DDP over gloo: both take a pass each, where one process takes two for a step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ours, reports = launch([*torchrun, "-m", "sloth_backend", str(EXAMPLE), *arguments], environment, tmp_path)
    assert ours == pytest.approx(stock, rel=1e-5)
    assert [changed(report, "layer_program") for report in reports] == [LAYERS, LAYERS]
    assert reports[0] == reports[1]


def test_accelerate_launch_m_runs_a_script_like_python(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "probe.py"
    script.parent.mkdir()
    script.write_text(lines(PROBE))
    (script.parent / "beside.py").touch()
    command = ["accelerate", "launch", "--cpu", "-m", "sloth_backend", str(script), "--size", "3", "-m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert json.loads(done.stdout) == [["--size", "3", "-m"], True, "1"]
    trace = done.stderr[: done.stderr.index("LookupError: in the script")]
    assert trace.rstrip().endswith('raise LookupError("in the script")')
    assert f'File "{script}", line 8, in <module>' in trace


class TestEntry:
    """``python -m sloth_backend``, without a process of its own."""

    @pytest.fixture(autouse=True)
    def _restore(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        package = tmp_path / "runnable"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "train.py").write_text("import sys\nif __name__ == '__main__':\n    sys.exit(repr(sys.argv[1:]))\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        monkeypatch.setenv("SLOTH_BACKEND", "")

    def run(self, *arguments: str) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["__main__.py", *arguments])
            with pytest.raises(SystemExit) as ended:
                entry.main()
        return ended.value.code

    def test_a_module(self) -> None:
        assert self.run("-m", "runnable.train", "-m", "x") == "['-m', 'x']"
        assert sys.path[0] == ""
        assert os.environ["SLOTH_BACKEND"] == "1"

    def test_a_script(self, tmp_path: Path) -> None:
        script = tmp_path / "runnable" / "train.py"
        assert self.run(str(script), "-m", "x") == "['-m', 'x']"
        assert sys.path[0] == str(script.parent)

    @pytest.mark.parametrize("value", ["0", '{"kernels": false}'])
    def test_what_the_variable_says_stays(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLOTH_BACKEND", value)
        assert self.run("-m", "runnable.train") == "[]"
        assert os.environ["SLOTH_BACKEND"] == value

    @pytest.mark.parametrize("arguments", [[], ["-m"], ["--lora", "train.py"], ["nowhere.py"]])
    def test_what_cannot_be_run_is_said(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(*arguments) == 2
        printed = capsys.readouterr().err
        assert entry.USAGE in printed
        assert arguments != ["nowhere.py"] or "nowhere.py does not exist" in printed

    def test_a_variable_that_is_not_understood_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLOTH_BACKEND", "yess")
        assert "SLOTH_BACKEND is 'yess'" in str(self.run("-m", "runnable.train"))
