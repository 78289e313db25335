"""The switch in Accelerate: every way to say it, what prepare does with it, and the numbers of loops."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from trl import SFTTrainer

import sloth_backend
import sloth_backend.phases
from integration_tests import tiny
from integration_tests.hosts.accelerate_runs import (
    LAYERS,
    evaluate,
    make_accelerator,
    make_batches,
    make_model,
    switched,
    train,
)
from integration_tests.hosts.recorder import PHASES, Recorder
from integration_tests.hosts.trl_runs import make_args
from sloth_backend import SlothConfig, SlothConfigError, SlothPluginError, autoload, phases

OPTIONS = {"checkpointing": "host", "kernels": ["rope"]}
SPELLINGS = {"1": SlothConfig(), " True ": SlothConfig(), "sloth": SlothConfig(), "{}": SlothConfig()}
LEARNING_RATE = 0.1


@pytest.mark.parametrize(
    ("value", "expected"), [*SPELLINGS.items(), (json.dumps(OPTIONS), SlothConfig.from_mapping(OPTIONS))]
)
def test_every_spelling_of_the_variable(value: str, expected: SlothConfig, recorder: Recorder) -> None:
    model = make_model()
    with switched(value):
        assert make_accelerator().prepare(model) is model
    assert recorder.calls == PHASES[1:]
    assert recorder.run.config == expected
    assert (recorder.run.host, recorder.run.dtype, recorder.run.device.type) == ("accelerate", torch.float32, "cpu")


@pytest.mark.parametrize("value", [None, "", "0", "false", "off"])
def test_off_means_off(value: str | None, recorder: Recorder) -> None:
    before = vars(Accelerator)["prepare"]
    assert "accelerate.accelerator" in autoload.status().patched
    assert before.__qualname__ == "Accelerator.prepare"
    assert not hasattr(before, "__wrapped__")
    with switched(value):
        assert vars(Accelerator)["prepare"] is before
        make_accelerator().prepare(make_model())
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yess", "SLOTH_BACKEND is 'yess': expected 1, 0, or a mapping"),
        ("[1]", r"SLOTH_BACKEND is '\[1\]'"),
        ('{"kernel": false}', "unknown option 'kernel'; did you mean 'kernels'"),
        ('{"offload_keep_last": -1, "checkpointing": "disk"}', "2 problems"),
    ],
)
def test_a_value_that_is_not_understood_is_one_error(value: str, message: str, recorder: Recorder) -> None:
    with switched(value), pytest.raises(SlothConfigError, match=message):
        make_accelerator().prepare(make_batches())
    assert recorder.calls == []


def test_the_variable_is_read_where_it_is_by_then(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """Libraries put another object in place of ``os.environ``: datasets does, when it maps in processes of its own."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    with switched("1"):
        make_accelerator().prepare(make_model())
    assert recorder.calls == PHASES[1:]


def test_a_wrapped_prepare_looks_and_fails_like_the_original() -> None:
    accelerator, model = make_accelerator(), make_model()
    with switched("1"):
        assert Accelerator.prepare.__doc__ == Accelerator.prepare.__wrapped__.__doc__  # pyright: ignore
        with pytest.raises(ValueError, match="should be a list with 1 elements"):
            accelerator.prepare(model, device_placement=[True, False])
        with pytest.raises(TypeError, match="lerning_rate"):
            accelerator.prepare(model, lerning_rate=1)  # pyright: ignore[reportCallIssue]
    assert phases.find_session(model) is None
    assert tiny.describe(model) == tiny.describe(make_model())


def test_only_causal_language_models_are_touched(recorder: Recorder) -> None:
    plain, config = nn.Linear(2, 2), tiny.make_model(tiny.make_tokenizer()).config
    classifier = transformers.LlamaForSequenceClassification(config)
    encoder = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, num_layers=1, vocab_size=32))
    with switched("1"):
        make_accelerator().prepare(plain, classifier, encoder, make_batches(), torch.optim.SGD(plain.parameters()))
    assert recorder.calls == []


def test_parameters_and_the_state_of_random_numbers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(lora=True)
    parameters, state = list(model.parameters()), torch.get_rng_state()
    with switched("1"):
        make_accelerator().prepare(model, torch.optim.AdamW(model.parameters()))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert "accelerate, cpu, float32" in capsys.readouterr().err


OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "AdamW": (torch.optim.AdamW, 8.0),
    "SGD": (torch.optim.SGD, 0.0),
    "momentum": (lambda parameters: torch.optim.SGD(parameters, momentum=0.9), 4.0),
    "AdamW8bit": (type("AdamW8bit", (torch.optim.SGD,), {}), 2.1),
    "PagedAdamW": (type("PagedAdamW", (torch.optim.SGD,), {}), 0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_s_bytes_are_known(name: str, recorder: Recorder) -> None:
    model, other = make_model(lora=True), nn.Linear(2, 2)
    optimizer, expected = OPTIMIZERS[name]
    with switched("1"):
        make_accelerator().prepare(torch.optim.Adagrad(other.parameters()), model, optimizer(model.parameters()))
    assert recorder.run.optimizer_bytes == expected


@pytest.mark.parametrize(("placement", "device"), [(None, "meta"), ([True], "meta"), ([False], "cpu")])
def test_the_model_is_patched_on_the_device_that_it_trains_on(
    placement: list[bool] | None, device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = make_accelerator(), make_model()
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    with switched("1"):
        accelerator.prepare(model, device_placement=placement)
    assert recorder.run.device.type == model.device.type == device


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_failing_plugin_leaves_all_models_as_they_were(phase: str, recorder: Recorder) -> None:
    models = [make_model(), make_model(seed=1)]
    recorder.fail_in = phase
    with switched("1"), pytest.raises(SlothPluginError, match="ArithmeticError: as told"):
        make_accelerator("bf16").prepare(*models)
    assert [tiny.describe(m) for m in models] == [tiny.describe(m) for m in (make_model(), make_model(seed=1))]


def test_an_error_of_accelerate_leaves_the_models_as_accelerate_does() -> None:
    described = []
    for value in ("1", "0"):
        model, accelerator = make_model(), make_accelerator()
        with switched(value), pytest.MonkeyPatch.context() as patch:
            patch.setattr(accelerator, "prepare_optimizer", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        described.append(tiny.describe(model))
    assert described[0] == described[1]


def test_what_cannot_be_combined_is_refused_at_once() -> None:
    compiler = TorchDynamoPlugin(backend="inductor")  # pyright: ignore[reportArgumentType]
    model = make_model()
    with switched("1"):
        with pytest.raises(SlothConfigError, match=r"dynamo_backend=inductor\) cannot be combined with kernels=True"):
            make_accelerator(dynamo_plugin=compiler).prepare(model)
        with pytest.raises(SlothConfigError, match=r"dynamo_backend=torch.compile\(model\)"):
            make_accelerator().prepare(torch.compile(make_model()))
    with pytest.raises(SlothConfigError, match="dynamo_backend=inductor"):
        sloth_backend.attach(make_accelerator(dynamo_plugin=compiler))
    assert tiny.describe(model) == tiny.describe(make_model())


class TestAttach:
    def test_it_returns_the_accelerator_and_concerns_no_other(self, recorder: Recorder) -> None:
        first, second = make_accelerator(), Accelerator(cpu=True)
        assert sloth_backend.attach(first, config={"kernels": False}) is first
        second.prepare(make_model())
        assert recorder.calls == []
        first.prepare(make_model())
        assert recorder.calls == PHASES[1:]
        assert (recorder.run.host, recorder.run.config) == ("accelerate", SlothConfig(kernels=False))

    def test_the_tokenizer_is_mended_at_once_and_is_part_of_the_report(self, recorder: Recorder) -> None:
        tokenizer, models = tiny.make_tokenizer(), [make_model(), make_model(seed=1)]
        accelerator = sloth_backend.attach(make_accelerator(), tokenizer)
        assert recorder.calls == ["heal"]
        accelerator.prepare(*models)
        assert recorder.calls == [*PHASES, *PHASES[1:]]
        for model in models:
            assert [f.subject for f in sloth_backend.report(model).findings] == PHASES
            sloth_backend.undo(model)
        assert not [name for name in vars(tokenizer) if name.startswith("_mark")]

    def test_a_second_call_replaces_the_options(self, recorder: Recorder) -> None:
        accelerator = sloth_backend.attach(sloth_backend.attach(make_accelerator()), config={"kernels": False})
        accelerator.prepare(make_model())
        assert recorder.calls == PHASES[1:]
        assert recorder.run.config == SlothConfig(kernels=False)

    def test_what_is_said_in_code_counts_more_than_the_variable(self, recorder: Recorder) -> None:
        with switched("1"):
            sloth_backend.attach(make_accelerator(), config={"kernels": False}).prepare(make_model())
        assert recorder.calls == PHASES[1:]
        assert recorder.run.config == SlothConfig(kernels=False)

    def test_errors(self) -> None:
        accelerator = make_accelerator()
        with pytest.raises(TypeError, match=r"takes an accelerate\.Accelerator, got LlamaForCausalLM"):
            sloth_backend.attach(make_model())
        with pytest.raises(SlothConfigError, match="unknown option 'kernel'"):
            sloth_backend.attach(accelerator, config={"kernel": 1})
        accelerator.prepare(make_model())
        with pytest.raises(SlothConfigError, match=r"before accelerator\.prepare"):
            sloth_backend.attach(accelerator)


def run_loop(lora: bool, mixed_precision: str, folder: Path | None = None, cpu: bool = True) -> dict[str, Any]:
    """A whole life of a prepared model: accumulation, evaluation, saving, more training, loading, the same again."""
    accelerator = make_accelerator(mixed_precision, cpu, gradient_accumulation_steps=2)
    model = make_model(lora)
    # Adam would follow the sign of gradients that are next to nothing, which rounding decides.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(model, optimizer, make_batches())
    found: dict[str, Any] = {"train": train(accelerator, model, optimizer, batches)}
    found["eval"] = evaluate(accelerator, model, batches)
    if folder is not None:
        accelerator.save_state(str(folder))
        found["more"] = train(accelerator, model, optimizer, batches)
        accelerator.load_state(str(folder))
        found["again"] = train(accelerator, model, optimizer, batches)
    inner = accelerator.unwrap_model(model)
    found |= {"model": inner, "state": {k: v.clone() for k, v in accelerator.get_state_dict(model).items()}}
    accelerator.free_memory()
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_float32_loops_have_the_numbers_of_stock(lora: bool, tmp_path: Path) -> None:
    stock = run_loop(lora, "no", tmp_path / "stock")
    with switched("1"):
        ours = run_loop(lora, "no", tmp_path / "ours")
    for part in ("train", "eval", "more"):
        assert ours[part] == pytest.approx(stock[part], rel=1e-4, abs=1e-4)
    assert ours["train"] == pytest.approx(stock["train"], rel=1e-5)
    assert ours["again"] == ours["more"]
    assert ours["state"].keys() == stock["state"].keys()
    for name, value in stock["state"].items():
        torch.testing.assert_close(ours["state"][name], value, rtol=1e-3, atol=1e-3)
    changed = sloth_backend.report(ours["model"]).of(action="changed")
    assert [f.subject for f in changed if f.capability == "layer_program"] == LAYERS
    assert [f.subject for f in changed if f.capability == "linear_cross_entropy"] == ["loss"]
    assert not sloth_backend.report(stock["model"]).findings


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bfloat16_loops_stay_within_stock_s_distance_to_float32(lora: bool) -> None:
    truth, stock = run_loop(lora, "no"), run_loop(lora, "bf16")
    with switched("1"):
        ours = run_loop(lora, "bf16")
    assert sloth_backend.report(ours["model"]).of(action="changed", capability="layer_program")
    assert_as_near_as_stock(ours, stock, truth)
    assert ours["train"] != truth["train"]


def assert_as_near_as_stock(ours: dict[str, Any], stock: dict[str, Any], truth: dict[str, Any]) -> None:
    """At most as far from float32 as stock in the same dtype, and 2e-4 of what it is, since rounding is chance."""
    for part in ("train", "eval"):
        exact, plain, mine = (torch.tensor(found[part]) for found in (truth, stock, ours))
        assert (mine - exact).abs().max() <= (plain - exact).abs().max() + 2e-4 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loops_on_a_gpu(lora: bool, mixed_precision: str) -> None:
    """With a gradient scaler under float16; the model comes from the CPU and is patched for the GPU."""
    truth, stock = run_loop(lora, "no", cpu=False), run_loop(lora, mixed_precision, cpu=False)
    with switched("1"):
        ours = run_loop(lora, mixed_precision, cpu=False)
    report = sloth_backend.report(ours["model"])
    assert [f.subject for f in report.of(action="changed", capability="layer_program")] == LAYERS
    assert "cuda" in report.run
    assert_as_near_as_stock(ours, stock, truth)


def test_without_autocast_again_the_model_is_stock_s() -> None:
    """Accelerate takes all decorators off a forward, ours among them; the rest of the backend stays."""
    batch = next(iter(make_batches()))
    forwards = []
    for value in (None, "1"):
        with switched(value):
            accelerator = make_accelerator("bf16")
            model = accelerator.unwrap_model(accelerator.prepare(make_model()), keep_fp32_wrapper=False)
        forwards.append(model(**batch))
    assert forwards[1].loss.item() == pytest.approx(forwards[0].loss.item(), rel=1e-5)
    assert forwards[1].logits.dtype == forwards[0].logits.dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_undo_leaves_accelerate_s_autocast_on(lora: bool) -> None:
    batch = next(iter(make_batches()))
    stock = make_accelerator("bf16").prepare(make_model(lora))
    with switched("1"):
        model = make_accelerator("bf16").prepare(make_model(lora))
    assert sloth_backend.report(model).of(action="changed")
    sloth_backend.undo(model)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert not torch.equal(make_model(lora)(**batch).logits, stock(**batch).logits)
    assert tiny.describe(model).keys() == tiny.describe(stock).keys()
    unwrapped = [make_accelerator("bf16").unwrap_model(m, keep_fp32_wrapper=False) for m in (model, stock)]
    assert torch.equal(unwrapped[0](**batch).logits, unwrapped[1](**batch).logits)


def trained(folder: Path, model: Any, field: Any = None, **options: Any) -> tuple[list[float], transformers.Trainer]:
    """Losses of a plain Trainer with rows of one length."""
    tokenizer = tiny.make_tokenizer()
    rows = tokenizer(tiny.sentences(8), padding="max_length", max_length=24, truncation=True)["input_ids"]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", max_steps=3, disable_tqdm=True, save_strategy="no", logging_steps=1
    )
    args.backend = field  # type: ignore[attr-defined]
    trainer = transformers.Trainer(model, args, train_dataset=data, **options)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer


def test_a_trainer_without_a_keyword_has_all_that_one_with_it_has(tmp_path: Path) -> None:
    stock, _ = trained(tmp_path, make_model())
    with switched("1"):
        ours, trainer = trained(tmp_path, make_model())
    assert ours == pytest.approx(stock, rel=1e-5)
    report = sloth_backend.report(trainer.model)  # pyright: ignore[reportArgumentType]
    assert [f.subject for f in report.of(action="changed", capability="layer_program")] == LAYERS
    assert report.of(capability="batch_fusion")
    assert sloth_backend.phases.find_session(trainer.model).run.host == "transformers"  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("said", [{"backend": False}, {"field": False}])
def test_a_trainer_that_says_no_is_left_alone(said: dict[str, bool], tmp_path: Path) -> None:
    with switched("1"):
        _, trainer = trained(tmp_path, make_model(), **said)
    assert sloth_backend.phases.find_session(trainer.model) is None  # type: ignore[arg-type]


def test_a_trainer_keeps_a_model_that_is_switched_on_already(tmp_path: Path) -> None:
    model = sloth_backend.optimize(make_model(), config={"print_report": False})
    session = sloth_backend.phases.find_session(model)
    with switched("1"):
        trained(tmp_path, model)
    assert sloth_backend.phases.find_session(model) is session


def test_a_trainer_with_the_keyword_is_not_switched_on_twice(recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    with switched("1"):
        options = {"train_dataset": tiny.make_dataset(), "processing_class": tokenizer}
        trainer: Any = SFTTrainer(make_model(), make_args(tmp_path, max_steps=1), backend="sloth", **options)
        trainer.train()
    assert recorder.calls == PHASES
    assert recorder.run.host == "trl"
