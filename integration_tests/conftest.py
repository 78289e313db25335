"""What holds for all tests: the garbage collector looks at what they make, not at all that their imports have made.

Trainers call it once a run, and it would take a second each time.
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
