"""Steps laid ahead: while the device is busy, as they would be laid in their own time, and only for those steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from integration_tests import tiny
from integration_tests.plugins.batch_fusion import trainers
from integration_tests.plugins.batch_fusion.test_rows import Prices, padded
from sloth_backend import ranks
from sloth_plugins.batch_fusion import fusion as fusions
from sloth_plugins.batch_fusion.budget import Budget
from sloth_plugins.batch_fusion.fusion import Fusion
from sloth_plugins.batch_fusion.laid import Laid
from sloth_plugins.batch_fusion.means import Means
from sloth_plugins.batch_fusion.rows import IGNORED, rows_of

CPU = torch.device("cpu")
MICRO = 3
Batch = dict[str, torch.Tensor]


def numbered(step: int, *lengths: int) -> list[Batch]:
    """A step's micro-batches, a row of each length and a shorter one; the tokens tell the step."""
    batches = [padded([length, 2]) for length in lengths or (5, 3, 4)]
    return [{name: t + 100 * step if name == "input_ids" else t for name, t in b.items()} for b in batches]


class Host:
    """As much of a trainer as a Fusion asks for. ``passed`` is what the model was called with."""

    def __init__(self, loss_kwargs: bool = True, distributed: bool = False) -> None:
        self.model_accepts_loss_kwargs = loss_kwargs
        self.args = SimpleNamespace(gradient_accumulation_steps=MICRO, device=CPU)
        self.state = SimpleNamespace(global_step=0, max_steps=10)
        self.accelerator = SimpleNamespace(
            use_distributed=distributed,
            dataloader_config=None,
            gradient_state=SimpleNamespace(end_of_dataloader=False),
            no_sync=lambda model: nullcontext(),
        )
        self.passed: list[Mapping[str, torch.Tensor]] = []

    def samples(self, iterator: Iterator[Batch], count: int, device: torch.device) -> tuple[list[Batch], torch.Tensor]:
        """Fetches and counts, as the Trainer does."""
        batches = list(islice(iterator, count))
        return batches, torch.tensor(sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches))

    def step(self, model: Any, inputs: Mapping[str, torch.Tensor], count: Any) -> torch.Tensor:
        self.passed.append(inputs)
        return torch.ones(())


class Loop:
    """A Fusion in its host's loop, over the batches of one epoch."""

    def __init__(self, host: Host, planner: Prices | None = None, apart: bool = False) -> None:
        self.host, self.planner = host, planner or Prices(1000, 1000)
        self.fusion = Fusion(host, Budget(self.planner, None), None, apart)
        self.fusion.on_host = True

    def begin(self, iterator: Iterator[Batch], count: int = MICRO) -> list[Batch]:
        return self.fusion.get_batch_samples(Host.samples, self.host, iterator, count, CPU)[0]

    def train(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.fusion.training_step(Host.step, self.host, None, batch, None)

    def made(self) -> list[Batch]:
        """The passes of the step that is about to run."""
        return [one.inputs for _, passes in self.fusion.work for one in passes]


def of_steps(*steps: list[Batch]) -> Iterator[Batch]:
    return chain.from_iterable(steps)


def fresh(batches: list[Batch], ways: int = 1) -> list[Batch]:
    laid = Laid.of(batches, [rows_of(batch) for batch in batches], CPU)
    return [one.inputs for one in laid.sent(laid.ways[ways], CPU)]


def assert_equal(mine: list[Batch], theirs: list[Batch]) -> None:
    assert len(mine) == len(theirs)
    for ours, others in zip(mine, theirs, strict=True):
        assert ours.keys() == others.keys()
        assert all(torch.equal(ours[name], others[name]) for name in others)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no batch is taken apart."""

    def refused(batch: Any) -> None:
        raise AssertionError("a batch was taken apart in its own step")

    monkeypatch.setattr(fusions, "rows_of", refused)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("loss_kwargs", [False, True])
def test_the_next_step_is_laid_while_the_device_is_busy(
    loss_kwargs: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, batches = Loop(Host(loss_kwargs), apart=apart), of_steps(numbered(0), numbered(1))
    monkeypatch.setattr(Means, "of", lambda self, shares: nullcontext())  # no model here asks for its loss
    loop.train(loop.begin(batches))
    forbid(monkeypatch)
    second = loop.begin(batches)
    alone = [one for batch in second for one in fresh([batch])]
    assert_equal(loop.made(), alone if apart else fresh(second))


def test_a_pass_is_all_rows_end_to_end() -> None:
    batches = [padded([2, 1]), padded([3])]
    (one,) = fresh(batches)
    assert one["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3]]
    assert one["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED, 2, 3]]
    assert one["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]


def test_what_goes_to_a_gpu_is_pinned_when_it_is_laid(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    batches = numbered(0)
    laid = Laid.of(batches, [rows_of(batch) for batch in batches], torch.device("cuda"))
    assert list(map(id, pinned)) == list(map(id, laid.inputs.values()))


def test_passes_are_the_same_however_they_are_cut() -> None:
    batches = numbered(0)
    (whole,) = fresh(batches)
    for ways in range(1, MICRO + 1):
        parts = fresh(batches, ways)
        assert len(parts) == ways
        joined = {name: torch.cat([part[name] for part in parts], 1) for name in whole}
        assert_equal([joined], [whole])


def test_batches_of_another_epoch_are_not_those_laid() -> None:
    loop, batches, others = Loop(Host()), of_steps(numbered(0), numbered(1)), numbered(2)
    loop.train(loop.begin(batches))
    assert loop.begin(iter(others))[0] is others[0]
    assert_equal(loop.made(), fresh(others))
    assert loop.fusion.laid is None


@pytest.mark.parametrize("asked", [1, 2])
def test_fewer_batches_than_were_laid(asked: int) -> None:
    loop, second = Loop(Host()), numbered(1)
    batches = of_steps(numbered(0), second)
    loop.train(loop.begin(batches))
    assert len(loop.begin(batches, asked)) == asked
    assert_equal(loop.made(), fresh(second[:asked]))


def test_an_incomplete_last_step_is_laid_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, last = Loop(Host()), numbered(1, 6, 2)
    batches = of_steps(numbered(0), last)
    loop.train(loop.begin(batches))
    forbid(monkeypatch)
    assert len(loop.begin(batches, 2)) == 2
    assert_equal(loop.made(), fresh(last))


def test_how_many_passes_pay_is_asked_in_the_step_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, batches = Loop(Host()), of_steps(numbered(0), numbered(1))
    first = loop.begin(batches)
    assert len(loop.made()) == 1
    loop.train(first)
    forbid(monkeypatch)
    loop.planner.limit = 12  # memory got scarce in between
    assert_equal(fresh(loop.begin(batches), 2), loop.made())


def test_batches_on_the_device_are_not_waited_for() -> None:
    loop, batches = Loop(Host()), of_steps(numbered(0), numbered(1))
    loop.fusion.on_host = False
    loop.train(loop.begin(batches))
    assert loop.fusion.laid is None
    assert_equal(fresh(loop.begin(batches)), loop.made())


def test_processes_agree_on_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(ranks, "largest", lambda values: asked.append(values) or values)
    loop, batches = Loop(Host(distributed=True)), of_steps(numbered(0), numbered(1))
    loop.train(loop.begin(batches))
    assert loop.fusion.laid is not None
    assert len(asked) == 1
    assert_equal(fresh(loop.begin(batches)), loop.made())
    assert len(asked) == 2


def test_what_does_not_fit_is_told_once_and_in_its_own_step(caplog: pytest.LogCaptureFixture) -> None:
    strange = [{**batch, "pixel_values": batch["labels"]} for batch in numbered(1)]
    loop, batches = Loop(Host()), of_steps(numbered(0), strange, strange)
    with caplog.at_level(logging.WARNING):
        loop.train(loop.begin(batches))
        assert not caplog.messages
        loop.train(loop.begin(batches))
        loop.train(loop.begin(batches))
    assert caplog.messages == ["a micro-batch is passed as it is: it carries pixel_values"]
    assert loop.host.passed[-MICRO:] == strange


def test_other_failures_come_in_their_own_step() -> None:
    listed: Any = {**numbered(1)[0], "input_ids": [[1, 2]]}
    loop, batches = Loop(Host()), of_steps(numbered(0), [listed])
    loop.train(loop.begin(batches))
    with pytest.raises(AttributeError, match="shape"):
        loop.begin(batches)


def test_a_loader_that_fails_does_so_in_its_own_step() -> None:
    def failing() -> Iterator[Batch]:
        yield from numbered(0)
        yield numbered(1)[0]
        raise OSError("the disk is gone")

    loop, batches = Loop(Host()), failing()
    loop.train(loop.begin(batches))
    with pytest.raises(OSError, match="gone"):
        loop.begin(batches)


@pytest.mark.parametrize("lengths", [[5, 9, 3, 12, 7, 7, 2, 11] * 2, [5, 9, 3, 12, 7, 7] * 2])
def test_a_run_is_the_same_to_the_bit(lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid, ahead, data = Fusion._laid, list[bool](), trainers.rows(lengths)

    def watched(self: Fusion, *args: Any) -> Laid:
        expected, found = self.laid, laid(self, *args)
        ahead.append(found is expected)
        return found

    monkeypatch.setattr(Fusion, "_laid", watched)
    early = trainers.run(tmp_path, tiny.make_model(trainers.TOKENIZER), data, {})
    monkeypatch.setattr(Fusion, "_lay_ahead", lambda *_: None)
    late = trainers.run(tmp_path, tiny.make_model(trainers.TOKENIZER), data, {})
    assert ahead == [False, True, False, False]
    for ours, theirs in zip(early[1].gradients, late[1].gradients, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
