"""TRL's books are kept without a wait between forward and backward, and hold what they hold elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import TrainerCallback

from integration_tests.hosts.trl_runs import CLOCKS, OWN_HEAD, lora, make_args, make_trainer
from integration_tests.plugins.batch_fusion.slow_device import FakeCopy, SlowDevice
from integration_tests.plugins.batch_fusion.test_fusion import LENGTHS, tokens
from sloth_kernels.known import know, known
from sloth_kernels.ops.linear_cross_entropy import linear_cross_entropy
from sloth_plugins.batch_fusion import bookkeeping, later
from sloth_plugins.batch_fusion.bookkeeping import Unhurried, settle
from sloth_plugins.batch_fusion.later import Later


class Books(TrainerCallback):
    """Notes the types of all numbers that callbacks are given, and of those in the trainer's books."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.kinds: set[type] = set()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        books = self.trainer._metrics["train"].values()
        self.kinds |= {type(number) for numbers in books for number in numbers}
        self.kinds.add(type(self.trainer._total_train_tokens))

    on_step_end = on_substep_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.kinds |= {type(value) for value in (*logs.values(), *state.log_history[-1].values())}


def train(
    folder: Path, backend: dict[str, Any] | None, device: SlowDevice | None = None, **more: Any
) -> tuple[Any, Books]:
    books = Books()
    steps = {"gradient_accumulation_steps": 4, "max_steps": 2, "optim": "sgd", **more}
    args = make_args(folder, gradient_checkpointing=False, save_strategy="steps", save_steps=2, **steps)
    options = {"peft_config": lora(init_lora_weights=False), "callbacks": [books], "backend": backend}
    books.trainer = trainer = make_trainer(folder, args=args, train_dataset=tokens(LENGTHS["short"]), **options)
    if device is not None:
        device.watch(trainer)
    trainer.train()
    return trainer, books


def history(trainer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in log.items() if not k.endswith(CLOCKS)} for log in trainer.state.log_history]


@pytest.mark.skipif(OWN_HEAD, reason="this TRL computes the loss in a head of its own, which counts on the device")
@pytest.mark.parametrize("memory", ["auto", "least"])
def test_the_host_waits_for_nothing_and_logs_the_same(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = {"print_report": False, "memory": memory}
    plain, stock = (train(tmp_path / name, how)[0] for name, how in (("plain", backend), ("stock", None)))
    device = SlowDevice(monkeypatch)
    trainer, books = train(tmp_path / "late", backend, device)
    assert len(device.copies) == 2 * device.passes  # the entropy and the accuracy of each
    assert device.passes == 2 if memory == "auto" else device.passes > 2
    assert history(trainer) == history(plain)
    assert repr(trainer._total_train_tokens) == repr(stock._total_train_tokens)
    for log, theirs in zip(history(trainer), history(stock), strict=True):
        assert {k: type(v) for k, v in log.items()} == {k: type(v) for k, v in theirs.items()}
        assert log.get("num_tokens") == theirs.get("num_tokens")
    assert books.kinds <= {int, float}
    saved = json.loads((tmp_path / "late" / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["log_history"] == trainer.state.log_history[:2]
    assert len(trainer.model._forward_hooks) == 1  # the device's own


def test_a_loss_that_reads_logits_logs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, copies = {"print_report": False}, []
    plain, _ = train(tmp_path / "plain", backend, loss_type="nll")
    monkeypatch.setattr(bookkeeping, "DEVICES", ("cpu",))
    send = lambda scalar: copies.append(scalar) or FakeCopy(scalar.detach().clone(), arrived=True)
    monkeypatch.setattr(later.Copy, "of", send)
    trainer, books = train(tmp_path / "late", backend, loss_type="nll")
    assert len(copies) >= 4
    assert history(trainer) == history(plain)
    assert books.kinds <= {int, float}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``torch`` makes tensors of a GPU that knows no numbers; what is sent home is 2.5."""
    monkeypatch.setattr(later.Copy, "of", lambda scalar: FakeCopy(torch.tensor(2.5), arrived=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


def test_questions_of_a_gpu(cuda: torch.device) -> None:
    count, unknown = know(torch.full((), 7, device=cuda), 7), torch.ones((), device=cuda)
    with pytest.raises(DataDependentOutputException):
        bool(count > 0)
    with Unhurried():
        total = count.sum()
        answers = [total.item(), int(total), float(total), bool(total), bool(total > 7), bool(total != 3)]
        sent = torch.tensor(5, device=cuda)
        late = (unknown / total).item()
        assert (type(late), late, isinstance(late, float)) == (Later, 2.5, True)
        assert torch.tensor(late).dtype == torch.tensor([late]).dtype == torch.float32
        with pytest.raises(DataDependentOutputException):
            bool(unknown > 0)
    assert [repr(answer) for answer in answers] == ["7", "7", "7.0", "True", "False", "True"]
    assert (sent.device, sent.dtype, known(sent)) == (cuda, torch.int64, 5)
    assert (total.device, total.dtype, (total > 7).dtype) == (cuda, torch.int64, torch.bool)


def test_a_number_that_needs_a_gradient_is_asked_as_ever(cuda: torch.device) -> None:
    with Unhurried(), pytest.raises(DataDependentOutputException):
        torch.ones((), device=cuda, requires_grad=True).item()


def test_on_a_cpu_it_changes_nothing() -> None:
    with Unhurried():
        x = torch.tensor(3.5, device="cpu")
        assert (type(x.item()), x.item(), float(x), bool(x > 4), torch.sum(input=x).item()) == (
            float,
            3.5,
            3.5,
            False,
            3.5,
        )


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.int32])
@pytest.mark.parametrize("number", [3, 2.5, True])
def test_what_is_sent_is_what_tensor_makes(number: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.tensor(number, dtype=dtype, device="cpu")
    SlowDevice(monkeypatch)
    with Unhurried():
        sent = torch.tensor(number, dtype=dtype, device="cpu")
    assert (sent.dtype, sent.shape) == (expected.dtype, expected.shape)
    assert torch.equal(sent, expected)
    assert known(sent) in (None, expected.item())


def test_a_known_number_is_forgotten_when_it_is_written_to() -> None:
    count = know(torch.tensor(7), 7)
    assert known(count) == 7
    count += 1
    assert known(count) is None


def test_the_loss_knows_how_many_rows_have_a_label() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8)
    sums = linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 3, 4, -100, 9]))
    assert known(sums.n_valid) == sums.n_valid.item() == 4


def test_settling_leaves_plain_numbers_alone() -> None:
    class Trainer:
        def __init__(self) -> None:
            self._total, self.other = Later(int, [3, FakeCopy(torch.tensor(4), arrived=True)]), "x"
            late = Later(float, [FakeCopy(torch.tensor(0.5), arrived=True)])
            self._metrics = {"train": {"entropy": [1.0, late, late], "none": []}, "eval": {}}

    trainer = Trainer()
    settle(trainer)
    assert (type(trainer._total), trainer._total, trainer.other) == (int, 7, "x")
    assert [type(number) for number in trainer._metrics["train"]["entropy"]] == [float] * 3
    assert trainer._metrics["train"] == {"entropy": [1.0, 0.5, 0.5], "none": []}
