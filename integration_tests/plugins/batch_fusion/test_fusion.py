"""Passes that stand for micro-batches, inside TRL's trainer: the gradients, losses and counts are the host's."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerCallback

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.trl_runs import lora, make_args, make_trainer
from sloth_plugins.batch_fusion import documents
from sloth_plugins.batch_fusion.rows import IGNORED
from sloth_plugins.layer_programs import passes

EXACT = 1e-6
"""What sums in another order leave of float32, relative to a gradient's norm."""
LENGTHS = {
    "short": [5, 9, 3, 12, 7, 7, 2, 11],
    "very unequal": [1, 2000, 3, 700, 1, 64, 2, 5],
    "equal": [16] * 8,
    "an incomplete last step": [5, 9, 3, 12, 7, 7],
}


def tokens(lengths: list[int], ignored: tuple[int, ...] = ()) -> Dataset:
    """Tokenised rows; of those ``ignored`` no token is trained."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 300, (n,), generator=g).tolist() for n in lengths]
    masks = [[int(i not in ignored)] * n for i, n in enumerate(lengths)]
    return Dataset.from_list([{"input_ids": r, "completion_mask": m} for r, m in zip(rows, masks, strict=True)])


class Watch(TrainerCallback):
    """Notes the gradients of each step, and how often the model was called."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.passes = 0
        self.substeps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(lambda *_: setattr(self, "passes", self.passes + 1))

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.substeps += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(grads)


def run(folder: Path, data: Any, accumulation: str | None, steps: int = 2, **options: Any) -> tuple[Any, Watch]:
    """A trainer that has run four micro-batches of two rows a step; without the backend for ``accumulation=None``."""
    watch = Watch()
    # Adam would make much of gradients that differ by roundings where they are next to nothing.
    arguments = {"gradient_accumulation_steps": 4, "max_steps": steps, "max_length": None, "optim": "sgd"}
    args = make_args(folder, **{**arguments, **options.pop("args", {})})
    # Attention that is not flat: of a flat one, little but roundings would be left of the gradients of queries.
    size = {"max_position_embeddings": 4096, "initializer_range": 0.1}
    model = options.pop("model", None) or tiny.make_model(tiny.make_tokenizer(), **size)
    backend = None if accumulation is None else {"accumulation": accumulation, "print_report": False}
    options.setdefault("peft_config", lora(init_lora_weights=False))
    trainer = make_trainer(
        folder, model=model, args=args, train_dataset=data, callbacks=[watch], backend=backend, **options
    )
    trainer.train()
    return trainer, watch


def assert_same(mine: tuple[Any, Watch], theirs: tuple[Any, Watch], tolerance: float = EXACT) -> None:
    """Gradients, losses, learning rates and counts. After the first step weights differ too, by its roundings."""
    for step, (ours, stock) in enumerate(zip(mine[1].gradients, theirs[1].gradients, strict=True)):
        assert ours.keys() == stock.keys()
        for name, grad in stock.items():
            assert (ours[name] - grad).norm() <= tolerance * (3 if step else 1) * grad.norm() + 1e-12, name
    assert mine[1].substeps == theirs[1].substeps
    for ours, stock in zip(mine[0].state.log_history, theirs[0].state.log_history, strict=True):
        for key in ("loss", "learning_rate", "num_tokens", "epoch", "step", "total_flos", "train_loss"):
            assert ours.get(key, -1) == pytest.approx(stock.get(key, -1), rel=1e-5), key
    assert mine[0].state.global_step == theirs[0].state.global_step


def reasons(trainer: Any) -> list[str]:
    return [f.reason for f in sloth_backend.report(trainer.model).of(action="skipped", capability="batch_fusion")]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_gradients_and_counts_are_those_of_one_by_one(name: str, checkpointing: bool, tmp_path: Path) -> None:
    data, args = tokens(LENGTHS[name]), {"gradient_checkpointing": checkpointing, "shuffle_dataset": False}
    fused, alone = (run(tmp_path, data, how, args=args) for how in ("auto", "host"))
    assert not reasons(fused[0])
    assert reasons(alone[0]) == ["accumulation='host'"]
    least = checkpointing and name != "very unequal"  # then memory counts on a CPU, and larger passes take more
    assert fused[1].passes < alone[1].passes or (least and fused[1].passes == alone[1].passes)
    # Of 2,000 tokens stock's own float32 gradients are up to 2.7e-6 off those in float64, and each CPU sums otherwise.
    assert_same(fused, alone, EXACT if name != "very unequal" else 2 * EXACT)


def test_one_pass_a_step_and_the_losses_of_stock(tmp_path: Path) -> None:
    data, args = tokens(LENGTHS["short"]), {"gradient_checkpointing": False}
    fused, stock = run(tmp_path, data, "auto", 3, args=args), run(tmp_path, data, None, 3, args=args)
    assert fused[1].passes == 3
    assert stock[1].passes == 12
    assert_same(fused, stock, 1e-5)


def test_rows_of_which_nothing_is_trained(tmp_path: Path) -> None:
    data = tokens(LENGTHS["short"], ignored=(0, 1, 5))
    fused, alone = (run(tmp_path, data, how) for how in ("auto", "host"))
    assert not reasons(fused[0])
    assert_same(fused, alone)


def test_tokens_that_fill_a_pass_up_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, args, seen = tokens(LENGTHS["short"]), {"gradient_checkpointing": False}, []
    plain = run(tmp_path, data, "auto", args=args)
    monkeypatch.setattr(documents, "PADDED", ("cpu",))
    begin = passes.Passes._begin
    monkeypatch.setattr(passes.Passes, "_begin", lambda self, x, mask: (seen.append(x.shape[1]), begin(self, x, mask)))
    filled = run(tmp_path, data, "auto", args=args)
    assert set(seen) == {128}
    assert_same(filled, plain)


def test_full_fine_tuning(tmp_path: Path) -> None:
    data, options = tokens(LENGTHS["short"]), {"peft_config": None, "args": {"gradient_checkpointing": False}}
    fused, alone = (run(tmp_path, data, how, **copy.deepcopy(options)) for how in ("auto", "host"))
    assert fused[1].passes == 2
    assert_same(fused, alone)


@pytest.mark.parametrize("how", ["packing", "padding_free"])
def test_packed_rows_pass_together_too(how: str, tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 24} if how == "packing" else {"padding_free": True, "max_length": None}
    data, args = tokens(LENGTHS["short"] * 4), {**options, "gradient_checkpointing": False}
    fused, alone, stock = (run(tmp_path, data, way, args=args) for way in ("auto", "host", None))
    assert fused[1].passes == 2
    assert_same(fused, alone)
    assert_same(fused, stock, 1e-5)


def test_data_that_streams(tmp_path: Path) -> None:
    def data() -> IterableDataset:
        return tokens(LENGTHS["short"] * 2).to_iterable_dataset()

    fused, alone = (run(tmp_path, data(), how) for how in ("auto", "host"))
    assert not reasons(fused[0])
    assert_same(fused, alone)


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    data, args = tokens(LENGTHS["short"] * 4), {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", data, "auto", 3, args=args)
    resumed, _ = run(tmp_path / "resumed", data, "auto", 1, args=args)
    resumed.args.max_steps = 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, p in whole[0].model.named_parameters():
        assert torch.equal(dict(resumed.model.named_parameters())[name], p), name


def test_evaluation_is_the_hosts(tmp_path: Path) -> None:
    data, args = tokens(LENGTHS["short"]), {"eval_strategy": "steps", "eval_steps": 1}
    fused, alone = (run(tmp_path, data, how, args=args, eval_dataset=data) for how in ("auto", "host"))
    evaluated = [[log["eval_loss"] for log in t.state.log_history if "eval_loss" in log] for t, _ in (fused, alone)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


def test_two_runs_of_one_seed_are_equal_to_the_bit(tmp_path: Path) -> None:
    losses = [
        [log.get("loss") for log in run(tmp_path, tokens(LENGTHS["short"]), "auto")[0].state.log_history]
        for _ in range(2)
    ]
    assert losses[0] == losses[1]


class Mixes(nn.Module):
    """A causal convolution: tokens see those before them, of whatever row they are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y + nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]


def test_a_model_that_mixes_rows_is_seen(tmp_path: Path) -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    model.model.layers[0].mlp = Mixes(model.model.layers[0].mlp)
    fused, stock = (run(tmp_path, tokens(LENGTHS["short"]), how, model=copy.deepcopy(model)) for how in ("auto", None))
    assert reasons(fused[0]) == ["rows laid end to end would not be kept apart"]
    found = sloth_backend.report(fused[0].model).of(action="skipped", capability="documents")
    assert "depends on the row before it" in found[0].reason
    assert_same(fused, stock, 1e-5)


def test_rows_longer_than_a_window_are_the_hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=10, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    fused, stock = (run(tmp_path, tokens(LENGTHS["short"]), how, model=copy.deepcopy(model)) for how in ("auto", None))
    assert "longer than the 10 tokens" in caplog.text
    assert_same(fused, stock, 1e-5)


def test_dropout_is_the_hosts_unless_asked(tmp_path: Path) -> None:
    data, options = tokens(LENGTHS["short"]), {"peft_config": lora(lora_dropout=0.1)}
    auto = run(tmp_path, data, "auto", **copy.deepcopy(options))
    asked = run(tmp_path, data, "fused", **copy.deepcopy(options), args={"gradient_checkpointing": False})
    assert "dropout" in reasons(auto[0])[0]
    assert (auto[1].passes, asked[1].passes) == (8, 2)


@pytest.mark.parametrize(
    ("args", "why"),
    [({"neftune_noise_alpha": 5.0}, "NEFTune"), ({"loss_type": "dft"}, "compute_loss_func|loss_type='dft'")],
)
def test_what_is_not_additive_says_so(args: dict[str, Any], why: str, tmp_path: Path) -> None:
    trainer, watch = run(tmp_path, tokens(LENGTHS["short"]), "auto", 1, args=args)
    assert re.search(why, reasons(trainer)[0])
    assert watch.passes == 4


def test_a_trainer_with_a_loss_of_its_own_is_left_alone(tmp_path: Path) -> None:
    from trl import SFTTrainer

    class Own(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    trainer = Own(
        tiny.make_model(tiny.make_tokenizer()),
        make_args(tmp_path),
        processing_class=tiny.make_tokenizer(),
        train_dataset=tokens(LENGTHS["short"]),
        backend="sloth",
    )
    assert reasons(trainer) == ["Own has a compute_loss of its own"]


def test_undo_gives_the_trainer_its_methods_back(tmp_path: Path) -> None:
    trainer, watch = run(tmp_path, tokens(LENGTHS["short"]), "auto")
    sloth_backend.undo(trainer.model)
    assert not {"get_batch_samples", "training_step", "get_train_dataloader"} & vars(trainer).keys()
    assert not trainer.model.get_base_model().get_decoder()._forward_pre_hooks
    before = watch.passes
    trainer.train()
    assert watch.passes - before == 2 * 8, "two hooks count each of the eight micro-batches"


def test_the_model_does_not_keep_the_trainer(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, tokens(LENGTHS["short"]), "auto")
    model, alive = trainer.model, weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
    sloth_backend.undo(model)


def test_ignored_is_what_losses_ignore() -> None:
    assert nn.CrossEntropyLoss().ignore_index == IGNORED
