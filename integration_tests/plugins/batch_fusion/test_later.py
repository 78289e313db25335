"""Numbers that come later: all that a number can do, and what has to be done without one."""

from __future__ import annotations

import copy
import functools
import json
import math
import numbers
import operator
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests.plugins.batch_fusion.slow_device import FakeCopy
from sloth_plugins.batch_fusion.later import Later, plain

VALUES = (2.5, -0.1, 0.0, float("inf"), 7, 0, -3, True)
TWO_SIDED = (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow)
COMPARED = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
ONE_SIDED = (operator.neg, operator.pos, abs, round, float, int, bool, complex, operator.index, repr, str, hash)
LOOKED_AT = (
    *(math.isfinite, math.floor, math.ceil, math.trunc, math.exp, "{:.3g}".format, "%.2f".__mod__, "%d".__mod__),
    *(np.isnan, np.float64, np.asarray, lambda x: np.array([x, 1]).tolist(), lambda x: f"{x} {x!r} {x:>9}"),
    *(lambda x: round(x, 1), lambda x: x.real, lambda x: x.as_integer_ratio(), lambda x: range(x)[-1], {2.5: 1}.get),
    *(lambda x: torch.ones(2) * x, lambda x: x - torch.ones(2), lambda x: torch.add(torch.ones(2), x).tolist()),
)
PROTOCOLS = ("__deepcopy__", "__array_interface__", "__len__", "_private")


def soon(value: Any, arrived: bool = True) -> Any:
    return Later(
        type(value), [FakeCopy(torch.tensor(value, dtype=torch.float64 if type(value) is float else None), arrived)]
    )


def outcome(function: Any, *args: Any) -> Any:
    """What comes of it as something to compare: its type, its words, or the type of its error."""
    try:
        result = function(*args)
    except Exception as error:
        return type(error)
    return type(result), repr(result)


@pytest.mark.parametrize("value", VALUES)
def test_it_does_what_its_number_does(value: Any) -> None:
    for function in (*ONE_SIDED, *LOOKED_AT):
        assert outcome(function, soon(value)) == outcome(function, value), function
    for function in (*TWO_SIDED, *COMPARED, divmod):
        for other in VALUES:
            expected = outcome(function, value, other), outcome(function, other, value)
            assert outcome(function, soon(value), other) == expected[0]
            assert outcome(function, other, soon(value)) == expected[1]
            assert outcome(function, soon(value), soon(other)) == expected[0]


@pytest.mark.parametrize("value", [2.5, 7, True])
def test_copies_are_plain_numbers(value: Any) -> None:
    for copied in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), plain):
        assert outcome(copied, soon(value)) == (type(value), repr(value))
    assert json.dumps(copy.deepcopy({"entropy": [soon(value)]})) == json.dumps({"entropy": [value]})
    assert plain([soon(value), (soon(value), "x")]) == [value, (value, "x")]


@pytest.mark.parametrize("value", [2.5, 7, True])
def test_its_type_is_known_at_once(value: Any) -> None:
    late = soon(value, arrived=False)
    for kind in (float, int, bool, numbers.Real, numbers.Integral, str):
        assert isinstance(late, kind) == isinstance(value, kind)
    assert not any(hasattr(late, name) for name in PROTOCOLS)
    with pytest.raises(AssertionError, match="the host waited"):
        bool(late)


def test_sums_do_not_wait_and_add_in_the_order_of_numbers() -> None:
    values = [0.1, 0.2, 0.3, 1e16, -1e16, 0.7, 3]
    late = [soon(value, arrived=False) for value in values]
    total = sum(late)
    other = 5 + late[0] + (late[1] + late[2]) + 1.5
    assert not total.here()
    assert isinstance(total, float)
    for one in late:
        one._terms[0].arrived = True
    # Since Python 3.12 ``sum`` makes up for roundings where all it adds are plain floats.
    assert repr(total) == repr(functools.reduce(operator.add, values))
    assert repr(other) == repr(5 + 0.1 + (0.2 + 0.3) + 1.5)
    assert type(total / len(values)) is float


def test_what_has_arrived_is_kept_as_one_number() -> None:
    total: Any = 0
    for i in range(1000):
        late = soon(i, arrived=False)
        total += late
        assert len(total._terms) <= 2
        late._terms[0].arrived = True
    assert type(total + 0) is int
    assert total == sum(range(1000))
