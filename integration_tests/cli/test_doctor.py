"""``sloth doctor`` where something is wrong: it says what, and what to do."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from sloth_backend import autoload, doctor, hookimpl
from sloth_backend.manager import SlothManager
from sloth_kernels.op import Case, Op


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Fill in the versions that are to be found; None stands for a package that is not installed."""
    wanted: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = wanted[name] if name in wanted else real(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return wanted


def line(diagnosis: doctor.Diagnosis, section: str, name: str) -> doctor.Line:
    return next(found for found in diagnosis.sections[section] if found.name == name)


def test_a_missing_package_makes_it_unusable_and_is_named(versions: dict[str, str | None]) -> None:
    versions["peft"] = None
    diagnosis = doctor.examine()
    assert not diagnosis.usable
    assert line(diagnosis, "versions", "peft") == doctor.Line(
        "peft", "problem", "not installed; supported: 0.20 or newer"
    )


def test_an_old_required_version_is_a_problem_and_an_old_optional_one_is_not(versions: dict[str, str | None]) -> None:
    versions |= {"transformers": "4.57.1", "axolotl": "0.12.2rc1"}
    diagnosis = doctor.examine()
    assert line(diagnosis, "versions", "transformers").detail == "4.57.1 is too old; supported: 5.16 to 5.23"
    assert line(diagnosis, "versions", "transformers").state == "problem"
    assert line(diagnosis, "versions", "axolotl").state == "inactive"


@pytest.mark.parametrize(("version", "newer"), [("5.23.9", False), ("5.24.0.dev0", True), ("6.0", True)])
def test_a_newer_version_is_named_as_untested(version: str, newer: bool) -> None:
    found = doctor._version("transformers", version, doctor.REQUIRED["transformers"], required=True)
    assert found.state == "ok"
    assert ("newer than what is tested" in found.detail) == newer


def test_the_switch_is_explained_where_autoload_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    found = doctor._trl()
    assert found.state == "inactive"
    assert "`import sloth_backend` before `import trl`" in found.detail


def test_a_switch_that_does_not_fit_the_host_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = autoload.Status(True, (), {"trl.trainer.sft_trainer": RuntimeError("the signature is new")})
    monkeypatch.setattr(autoload, "status", lambda: broken)
    found = doctor._trl()
    assert found.state == "problem"
    assert "the signature is new" in found.detail


def test_disabled_plugins_are_listed_with_the_reason() -> None:
    (found,) = doctor._plugins(SlothManager(disabled=frozenset({"rope_it"})))
    assert found == doctor.Line("rope_it", "inactive", "SLOTH_DISABLE names it")


def op(reference: Any) -> Op:
    """An op that doubles, with the given reference."""
    case = Case("one", lambda dtype, device: ((torch.ones(3, dtype=dtype, device=device),), {}))
    return Op("double", lambda x: x * 2, reference, cases=lambda: [case])


def test_ops_are_tried_and_owners_named() -> None:
    class Plugin:
        @hookimpl
        def sloth_ops(self) -> list[Op]:
            return [op(lambda x: x + x)]

    manager = SlothManager()
    manager.register(Plugin(), "doubling")
    ((found, owner),) = doctor._owners(manager, "sloth_ops")
    good = doctor._op(found, owner)
    assert (good.state, "from doubling: agrees with its reference" in good.detail) == ("ok", True)


@pytest.mark.parametrize(("launches", "engine"), [(True, "Triton, float32"), (False, "torch and the kernels of other")])
def test_only_ops_that_launch_kernels_are_called_triton(
    launches: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sloth_kernels.launch.runs_triton", lambda tensor: True)
    found = doctor._op(dataclasses.replace(op(lambda x: x + x), launches=launches), "doubling")
    assert found.state == "ok"
    assert found.detail.startswith(engine)


@pytest.mark.parametrize(
    ("reference", "why"),
    [(lambda x: x * 2.1, "is off its reference by 4.8e-02"), (lambda x: x / "2", "fails with TypeError")],
)
def test_an_op_that_is_wrong_or_fails_is_a_problem(reference: Any, why: str) -> None:
    bad = doctor._op(op(reference), "doubling")
    assert bad.state == "problem"
    assert why in bad.detail
