"""What holds for all tests.

The garbage collector looks at what they make, not at all that their imports have made: trainers call it once a run, and
it would take a second each time. And 4-bit weights are evaluated alike on all CPUs: on those with products of bfloat16
bitsandbytes rounds their scales, in stock as well, and keeps them so.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _as_on_any_cpu() -> Iterator[None]:
    from bitsandbytes.nn import modules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "has_avx512bf16", lambda: False)
        yield
