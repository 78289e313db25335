"""TRL with the switch: the same numbers as without it, and all of it taken back on request."""

from __future__ import annotations

import functools
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from trl import SFTTrainer
from trl.trainer import sft_trainer

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.recorder import PHASES, Recorder
from integration_tests.hosts.trl_runs import (
    CLOCKS,
    HOW,
    OWN_HEAD,
    STEPS,
    assert_kernels_in_place,
    assert_same_logs,
    logs,
    lora,
    make_args,
    make_trainer,
)

KINDS = ["text", "prompt_completion", "messages", "prompt_completion_messages"]
chunked_loss = pytest.mark.skipif(OWN_HEAD, reason="this TRL does not patch the model's forward for the loss")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``stock(kind, how)``: a trainer that has run without the switch, made once."""

    @functools.cache
    def train(kind: str, how: str) -> SFTTrainer:
        trainer = make_trainer(tmp_path_factory.mktemp("stock"), kind, **HOW[how]())
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "loaded") for kind in KINDS), *(("text", how) for how in list(HOW)[1:])]
)
def test_losses_and_metrics_are_those_of_trl(kind: str, how: str, stock: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind, backend="sloth", **HOW[how]())
    trainer.train()
    assert_kernels_in_place(trainer)
    assert_same_logs(trainer, stock(kind, how))


def test_a_model_given_by_name_trains_as_it_does_in_trl(model_folder: Path, tmp_path: Path) -> None:
    trainers = []
    for backend in (None, "sloth"):
        options = {"model": str(model_folder), "processing_class": None, "peft_config": lora()}
        trainers.append(make_trainer(tmp_path, "prompt_completion", backend=backend, **options))
        trainers[-1].train()
    assert_kernels_in_place(trainers[1])
    assert_same_logs(trainers[1], trainers[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_a_4bit_model_given_by_name_as_trl_loads_it(bf16: bool, tmp_path: Path) -> None:
    """In float32, its 4-bit products in bfloat16 and its adapters rounded to it."""
    folder = tiny.save(tmp_path / "model", hidden_size=64, intermediate_size=128)
    loading = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainers = []
    for backend in (None, "sloth"):
        args = make_args(tmp_path, bf16=bf16)
        options = {"quantization_config": loading, "peft_config": lora(), "processing_class": None}
        trainers.append(make_trainer(tmp_path, model=str(folder), args=args, backend=backend, **options))
        trainers[-1].train()
    stock, ours = trainers
    report = sloth_backend.report(ours.model)
    assert [f.subject for f in report.of(action="changed", capability="layer_program")] == tiny.LAYERS, str(report)
    assert ours.model.get_input_embeddings().weight.dtype == torch.float32
    losses = [[log["loss"] for log in logs(trainer) if "loss" in log] for trainer in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=2**-9)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_switch_draws_no_random_numbers(by_name: bool, model_folder: Path, tmp_path: Path) -> None:
    """Else dropout, noise and the order of the data would differ from a run without it."""
    states = []
    for backend in (None, "sloth"):
        options = {"model": str(model_folder), "processing_class": None} if by_name else {}
        make_trainer(tmp_path, backend=backend, **options)
        states.append([hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate()), np.random.rand()])
    assert states[0] == states[1]


@chunked_loss
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_losses_that_read_logits_are_those_of_trl_and_say_what_they_cost(loss_type: str, tmp_path: Path) -> None:
    trainers = []
    for backend in (None, "sloth"):
        trainers.append(make_trainer(tmp_path, args=make_args(tmp_path, loss_type=loss_type), backend=backend))
        trainers[-1].train()
    assert_same_logs(trainers[1], trainers[0])
    warned = sloth_backend.report(trainers[1].model).of(action="warned", capability="linear_cross_entropy")
    assert [(finding.plugin, loss_type in finding.reason) for finding in warned] == [("trl", True)]


def test_evaluation_gives_what_trl_gives(stock: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, backend="sloth")
    trainer.train()
    theirs, mine = (t.evaluate(tiny.make_dataset("messages", 6)) for t in (stock("text", "loaded"), trainer))
    for key in (key for key in theirs if not key.endswith(CLOCKS)):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_compute_metrics_sees_logits(tmp_path: Path) -> None:
    """TRL's chunked loss hands it token counts, so TRL's plain loss is what to compare with."""

    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return {"mean_logit": float(prediction.predictions.mean()), "entries": prediction.predictions.size}

    answers = []
    for backend, loss_type in ((None, "nll"), ("sloth", None)):
        args = make_args(tmp_path, max_steps=1, **({"loss_type": loss_type} if loss_type else {}))
        data = tiny.make_dataset("text", 3)
        trainer = make_trainer(tmp_path, args=args, backend=backend, eval_dataset=data, compute_metrics=metrics)
        trainer.train()
        answers.append(trainer.evaluate())
    for key in ("eval_mean_logit", "eval_entries", "eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert answers[1][key] == pytest.approx(answers[0][key], rel=1e-5), key


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(tmp_path: Path) -> None:
    args = functools.partial(make_args, tmp_path, save_strategy="steps", save_steps=2, backend="sloth")
    whole = make_trainer(tmp_path, args=args())
    whole.train()
    resumed = make_trainer(tmp_path, args=args())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_kernels_in_place(resumed)
    assert [log["loss"] for log in logs(resumed)[:STEPS]] == [log["loss"] for log in logs(whole)[:STEPS]]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("how", HOW)
def test_undo_restores_every_attribute_of_every_module(how: str, tmp_path: Path) -> None:
    stock, ours = (make_trainer(tmp_path, backend=backend, **HOW[how]()).model for backend in (None, "sloth"))
    assert tiny.describe(ours) != tiny.describe(stock)
    sloth_backend.undo(ours)
    assert tiny.describe(ours) == tiny.describe(stock)
    assert not sloth_backend.report(ours).findings


def test_training_goes_on_with_trl_s_loss_after_undo(stock: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, backend="sloth")
    sloth_backend.undo(trainer.model)
    trainer.train()
    assert logs(trainer) == logs(stock("text", "loaded"))


def test_a_second_trainer_takes_the_model_over(stock: Any, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    make_trainer(tmp_path, model=model, processing_class=tokenizer, backend="sloth")
    trainer = make_trainer(tmp_path, model=model, processing_class=tokenizer, backend="sloth")
    trainer.train()
    assert_kernels_in_place(trainer)
    assert_same_logs(trainer, stock("text", "loaded"))


@chunked_loss
def test_trl_s_loss_comes_back_where_no_plugin_takes_it(recorder: Recorder, stock: Any, tmp_path: Path) -> None:
    recorder.on_model = lambda model: recorder.calls.append("own" if "forward" not in vars(model) else "trl")
    trainer = make_trainer(tmp_path, backend="sloth")
    assert recorder.calls == [*PHASES, "own"]
    assert vars(trainer.model)["forward"].__func__.__qualname__.startswith("_patch_chunked_ce_lm_head")
    trainer.train()
    assert logs(trainer) == logs(stock("text", "loaded"))


@chunked_loss
def test_trl_s_loss_stays_where_the_options_exclude_ours(recorder: Recorder, tmp_path: Path) -> None:
    recorder.on_model = lambda model: recorder.calls.append("own" if "forward" not in vars(model) else "trl")
    make_trainer(tmp_path, backend={"kernels": ["rope"]})
    assert recorder.calls == [*PHASES, "trl"]


@chunked_loss
def test_a_forward_set_before_trl_s_is_kept(recorder: Recorder, tmp_path: Path) -> None:
    """As accelerate's device hooks set one."""
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)

    @functools.wraps(type(model).forward)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(hooked, model)
    seen = []
    recorder.on_model = lambda model: seen.append(vars(model)["forward"].__func__)
    make_trainer(tmp_path, model=model, processing_class=tokenizer, backend="sloth")
    assert seen == [hooked]


@chunked_loss
def test_a_lora_on_the_head_is_trl_s_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lm_head` is wrapped by a PEFT adapter"):
        make_trainer(tmp_path, backend="sloth", peft_config=lora(target_modules=["lm_head", "q_proj"]))


def add_fused_lm_head(model: Any, **_: Any) -> None:
    """What TRL 1.16 calls: a forward that computes the loss itself if asked by an argument of its own."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def _fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = types.MethodType(_fused_forward, model)


@chunked_loss
def test_trl_s_fused_head_is_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_trainer, "_patch_chunked_ce_lm_head", add_fused_lm_head)
    trainer = make_trainer(tmp_path, backend="sloth")
    assert vars(trainer.model)["forward"].__func__.__code__.co_name == "_fused_forward"
    report = sloth_backend.report(trainer.model)
    assert not report.of(action="changed", capability="linear_cross_entropy")
    skipped = report.of(action="skipped", capability="linear_cross_entropy")
    assert ("trl", "TRL's own fused head computes the loss") in [(f.plugin, f.reason) for f in skipped]
