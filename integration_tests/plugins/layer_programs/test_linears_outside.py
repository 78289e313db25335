"""Adapted linears: inside a program they belong to it, everywhere else the op ``lora`` computes them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import sloth_backend
from integration_tests.plugins.layer_programs.common import adapted, assert_same, llama, switched_on, train, twins
from integration_tests.sameness.architectures import make_model
from sloth_backend.findings import Finding

OFF = ["lora", "rms_norm", "rope", "glu"]


def adapted_linears(model: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def patched(model: Any) -> list[Finding]:
    return sloth_backend.report(model).of(action="changed", capability="lora")


def test_programs_keep_theirs() -> None:
    mine, _ = twins(llama())
    assert not sloth_backend.report(mine).of(capability="lora")
    assert not any("forward" in vars(linear) for linear in adapted_linears(mine).values())


def test_without_programs_all_are_patched() -> None:
    stock, mine = llama().train(), switched_on(llama(), kernels=OFF).train()
    linears = adapted_linears(mine)
    assert {finding.subject for finding in patched(mine)} == set(linears)
    assert all("forward" in vars(linear) for linear in linears.values())
    assert_same(train(mine), train(stock))
    sloth_backend.undo(mine)
    assert not any("forward" in vars(linear) for linear in linears.values())


def test_a_layer_that_runs_as_a_module_has_its_linears_patched() -> None:
    stock, mine = (adapted(make_model("llama")).train() for _ in range(2))
    odd = mine.get_base_model().model.layers[1]
    odd.forward = odd.forward  # on the instance, as another library would replace it
    switched_on(mine)
    assert {finding.subject.split(".")[2] for finding in patched(mine)} == {"1"}
    assert_same(train(mine), train(stock))


@pytest.mark.parametrize("kernels", [False, ["rms_norm"]])
def test_none_where_the_op_is_off(kernels: Any) -> None:
    assert not sloth_backend.report(switched_on(llama(), kernels=kernels)).of(capability="lora")
