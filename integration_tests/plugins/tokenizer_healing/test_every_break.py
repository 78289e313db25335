"""Every fault of the list, put into tokenizers on purpose: all are found, and healed where healing is defined."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from integration_tests.plugins.tokenizer_healing.breaks import BREAKS, FILES, Break, applies, clean, outcome

ON_REAL_FILES = [(version, fault) for version in FILES for fault in BREAKS if applies(fault, version)]
BESIDE = [fault for fault in BREAKS if applies(fault, "v1") and fault.subject != "tokenizer.encode"]
"""What is wrong beside the pipeline, whose faults have tests of their own."""


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a clean tokenizer once."""
    return functools.lru_cache(maxsize=1)(lambda version: clean(version, tmp_path_factory.mktemp("real") / "model"))


@pytest.mark.parametrize("fault", BESIDE, ids=lambda fault: fault.name)
def test_faults_beside_the_pipeline(healthy: Any, fault: Break) -> None:
    healthy.padding_side = "right"
    assert outcome(fault, healthy) is None


@pytest.mark.slow
@pytest.mark.parametrize(("version", "fault"), ON_REAL_FILES, ids=lambda part: getattr(part, "name", part))
def test_on_every_real_file(make: Any, version: str, fault: Break) -> None:
    assert outcome(fault, make(version)) is None


def test_each_file_has_faults_of_every_kind() -> None:
    subjects = {fault.subject for fault in BREAKS}
    assert len(subjects) >= 11
    for version in FILES:
        own = [fault for fault in BREAKS if applies(fault, version)]
        assert {fault.subject for fault in own} == subjects
        assert len({fault.name for fault in own}) == len(own)
