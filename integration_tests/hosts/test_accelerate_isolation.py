"""Models with and without the backend in one process, several activations, threads and forked data workers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.accelerate_runs import LAYERS, make_accelerator, make_batches, make_model, switched, train
from sloth_backend import phases

QUIET = {"print_report": False}


def prepared(accelerator: Any, model: Any) -> tuple[Any, Any]:
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def epoch(accelerator: Any, model: Any, batches: Any = None) -> list[float]:
    return train(accelerator, *prepared(accelerator, model), batches or make_batches())


@pytest.fixture(scope="module")
def stock() -> list[float]:
    """Losses of an epoch without the backend."""
    return epoch(make_accelerator(), make_model())


def programs(model: Any) -> list[str]:
    return [f.subject for f in sloth_backend.report(model).of(action="changed", capability="layer_program")]


def test_a_model_without_beside_a_model_with_the_backend(stock: list[float]) -> None:
    """Same class, same weights, one process, in turns: the one is stock's to the bit, attributes and all."""
    plain, ours = make_model(), make_model()
    before = tiny.describe(plain)
    first = make_accelerator()
    second = sloth_backend.attach(copy.copy(first), config=QUIET)
    with_us = prepared(second, ours)
    assert tiny.describe(plain) == before
    without = prepared(first, plain)
    losses: list[list[float]] = [[], []]
    for batch in make_batches():
        losses[0] += train(first, *without, [batch])
        losses[1] += train(second, *with_us, [batch])
    assert losses[0] == stock
    assert losses[1] == pytest.approx(stock, rel=1e-5)
    assert (programs(plain), programs(ours)) == ([], LAYERS)
    sloth_backend.undo(ours)
    ours.load_state_dict(plain.state_dict())
    assert tiny.describe(ours) == tiny.describe(plain)


ACTIVATIONS: dict[str, Callable[[Any, Any], None]] = {
    "prepare": lambda accelerator, model: accelerator.prepare(model),
    "attach": lambda accelerator, model: sloth_backend.attach(accelerator, config=QUIET).prepare(model),
    "optimize": lambda accelerator, model: sloth_backend.optimize(model, config=QUIET),
}


PAIRS = [("prepare", "prepare"), ("prepare", "optimize"), ("attach", "prepare"), ("optimize", "attach")]


@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_activation_twice_is_harmless(first: str, then: str, stock: list[float]) -> None:
    """Two of the ways, then a third time by the loop's own prepare; one undo takes all of it back."""
    model = make_model()
    with switched('{"print_report": false}'):
        for way in (first, then):
            accelerator = make_accelerator()
            ACTIVATIONS[way](accelerator, model)
            accelerator.free_memory()
        session = phases.find_session(model)
        assert epoch(make_accelerator(), model) == pytest.approx(stock, rel=1e-5)
    assert phases.find_session(model) is session
    assert programs(model) == LAYERS
    sloth_backend.undo(model)
    model.load_state_dict(make_model().state_dict())
    model.zero_grad()
    found, expected = tiny.describe(model), tiny.describe(make_model())
    assert found[""].pop("_is_accelerate_prepared")
    assert found == expected


def test_twice_under_autocast(stock: list[float]) -> None:
    batch = next(iter(make_batches()))
    outputs = []
    for value in (None, '{"print_report": false}'):
        with switched(value):
            accelerator, model = make_accelerator("bf16"), make_model()
            model = accelerator.prepare(accelerator.prepare(model))
        outputs.append(model(**batch).loss.item())
    assert outputs[1] == pytest.approx(outputs[0], rel=2e-4)


def test_threads_do_not_touch_each_other(stock: list[float]) -> None:
    """Two models with the backend and one without are switched on and trained at the same time."""
    accelerator, found, errors = make_accelerator(), dict[str, list[float]](), list[BaseException]()
    start = threading.Barrier(3)

    def work(name: str) -> None:
        try:
            model = make_models[name]
            own = copy.copy(accelerator)
            own = own if name == "plain" else sloth_backend.attach(own, config=QUIET)
            start.wait()
            found[name] = epoch(own, model)
        except BaseException as error:
            errors.append(error)

    make_models = {name: make_model() for name in ("one", "two", "plain")}
    threads = [threading.Thread(target=work, args=(name,)) for name in make_models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    assert found["plain"] == stock
    for name in ("one", "two"):
        assert found[name] == pytest.approx(stock, rel=1e-5)
        assert programs(make_models[name]) == LAYERS


def test_forked_workers_tokenise_while_the_backend_is_on(stock: list[float]) -> None:
    """Workers are forked from a process in which the tokenizer was mended and the model has trained."""
    tokenizer = tiny.make_tokenizer()
    accelerator = sloth_backend.attach(make_accelerator(), tokenizer, QUIET)
    model, optimizer, batches = accelerator.prepare(
        model := make_model(), torch.optim.SGD(model.parameters(), lr=0.1), make_batches(2, tokenizer)
    )
    assert train(accelerator, model, optimizer, batches) == pytest.approx(stock, rel=1e-5)
    again = train(accelerator, model, optimizer, batches)
    assert max(again) < max(stock)


def test_a_copy_of_a_model_trains_alone(stock: list[float]) -> None:
    """As made for moving averages: the copy has the numbers of stock, and its training does not reach the original."""
    with switched('{"print_report": false}'):
        accelerator = make_accelerator()
        model = accelerator.prepare(make_model())
        twin = copy.deepcopy(model)
    assert train(accelerator, *prepared(accelerator, twin), make_batches()) == pytest.approx(stock, rel=1e-5)
    for name, value in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
