"""The switch in TRL: every way to say it, the same numbers as without it, and all of it taken back on request."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer import sft_trainer

import sloth_backend
from integration_tests import tiny
from integration_tests.child import run
from integration_tests.hosts.recorder import Recorder
from sloth_backend import SlothConfig, SlothConfigError, SlothPluginError

STEPS = 4
KINDS = ["text", "prompt_completion", "messages", "prompt_completion_messages"]
CLOCKS = ("runtime", "per_second")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHASES = ["heal", "fix", "patch"]


def make_args(folder: Path, **options: Any) -> SFTConfig:
    """Four steps of two passes each, in float32 on the CPU."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "save_strategy": "no",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    return SFTConfig(str(folder), **{**defaults, **options})


def make_trainer(
    folder: Path, kind: str = "text", model: Any = None, args: SFTConfig | None = None, **options: Any
) -> SFTTrainer:
    """A trainer of a fresh tiny model, unless ``model`` is given."""
    tokenizer = tiny.make_tokenizer()
    options.setdefault("processing_class", tokenizer)
    options.setdefault("train_dataset", tiny.make_dataset(kind))
    model = model or tiny.make_model(tokenizer)
    torch.manual_seed(0)  # PEFT draws its adapters inside
    return SFTTrainer(model, args or make_args(folder), **options)


def logs(trainer: SFTTrainer) -> list[dict[str, float]]:
    """What the trainer has logged of its training, without what a clock told."""
    history = [log for log in trainer.state.log_history if "eval_loss" not in log]
    return [{k: v for k, v in log.items() if not k.endswith(CLOCKS)} for log in history]


def assert_same_logs(ours: SFTTrainer, stock: SFTTrainer) -> None:
    """Losses within 1e-5, all else that TRL logs within 1e-4, relative: float32 summed in another order."""
    assert len(logs(ours)) == len(logs(stock)) > STEPS
    for mine, theirs in zip(logs(ours), logs(stock), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
        losses = [key for key in theirs if key.endswith("loss")]
        assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=1e-5)
    assert {"loss", "entropy", "num_tokens", "mean_token_accuracy"} <= logs(ours)[0].keys()


def fused(trainer: SFTTrainer) -> bool:
    """Whether a plugin computes the loss."""
    return bool(sloth_backend.report(trainer.model).of(action="changed", capability="linear_cross_entropy"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``stock(kind, how)``: a trainer that has run without the switch, made once."""

    @functools.cache
    def train(kind: str, how: str) -> SFTTrainer:
        trainer = make_trainer(tmp_path_factory.mktemp("stock"), kind, **HOW[how]())
        trainer.train()
        return trainer

    return train


def lora(**options: Any) -> LoraConfig:
    """LoRA on all linear layers but the head."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LINEARS, **options})


def lora_model() -> Any:
    """A tiny model that carries LoRA already."""
    model = tiny.make_model(tiny.make_tokenizer())
    return get_peft_model(model, lora())


HOW: dict[str, Any] = {
    "loaded": dict,
    "peft_config": lambda: {"peft_config": lora()},
    "peft_model": lambda: {"model": lora_model()},
    "trained_head": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
}
"""Ways to hand a model over, as arguments of ``make_trainer``."""


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "loaded") for kind in KINDS), *(("text", how) for how in list(HOW)[1:])]
)
def test_losses_and_metrics_are_those_of_trl(kind: str, how: str, stock: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind, backend="sloth", **HOW[how]())
    trainer.train()
    assert fused(trainer)
    assert_same_logs(trainer, stock(kind, how))


def test_a_model_given_by_name_trains_as_it_does_in_trl(model_folder: Path, tmp_path: Path) -> None:
    trainers, states = [], []
    for backend in (None, "sloth"):
        options = {"model": str(model_folder), "processing_class": None, "peft_config": lora()}
        trainers.append(make_trainer(tmp_path, "prompt_completion", backend=backend, **options))
        states.append(torch.get_rng_state())
        trainers[-1].train()
    assert fused(trainers[1])
    assert_same_logs(trainers[1], trainers[0])
    assert torch.equal(*states), "the switch drew random numbers"


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
        args = make_args(tmp_path, loss_type=loss_type, max_steps=1)
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
    assert fused(resumed)
    assert [log["loss"] for log in logs(resumed)[:STEPS]] == [log["loss"] for log in logs(whole)[:STEPS]]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "backend",
    ["sloth", True, {}, {"kernels": False}, SlothConfig(offload_keep_last=3), '{"kernels": ["rope"]}'],
    ids=str,
)
@pytest.mark.parametrize("place", ["trainer", "config"])
def test_every_spelling_of_the_switch(place: str, backend: Any, recorder: Recorder, tmp_path: Path) -> None:
    if place == "config":
        trainer = make_trainer(tmp_path, args=make_args(tmp_path, backend=backend))
    elif isinstance(backend, str) and backend.startswith("{"):
        pytest.skip("JSON is how a command line gives a mapping; only the config is parsed from one")
    else:
        trainer = make_trainer(tmp_path, backend=backend)
    assert recorder.calls == PHASES
    expected = json.loads(backend) if isinstance(backend, str) and backend.startswith("{") else backend
    assert recorder.run.config == SlothConfig.parse(expected)
    assert (recorder.run.host, recorder.run.gradient_checkpointing) == ("trl", True)
    assert [finding.plugin for finding in sloth_backend.report(trainer.model).findings] == ["recorder"] * 3


@pytest.mark.parametrize("backend", [None, False, ""])
def test_off_means_off(backend: Any, recorder: Recorder, tmp_path: Path) -> None:
    make_trainer(tmp_path, backend=backend)
    make_trainer(tmp_path, args=make_args(tmp_path, backend=backend))
    make_trainer(tmp_path, args=make_args(tmp_path, backend="sloth"), backend=False)
    assert recorder.calls == []


def test_keyword_and_config_may_agree_but_not_differ(recorder: Recorder, tmp_path: Path) -> None:
    make_trainer(tmp_path, args=make_args(tmp_path, backend={}), backend="sloth")
    assert recorder.calls == PHASES
    with pytest.raises(SlothConfigError, match=r"SFTTrainer\(backend=True\) and SFTConfig\(backend=.* differ"):
        make_trainer(tmp_path, args=make_args(tmp_path, backend={"kernels": False}), backend=True)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("slot", "unknown backend 'slot': expected 'sloth'"),
        (7, "unknown backend 7"),
        ({"kernel": False}, "unknown option 'kernel'; did you mean 'kernels'?"),
        ({"kernels": ["rms_nrm"]}, "unknown op 'rms_nrm'"),
        ({"offload_keep_last": -1, "checkpointing": "disk"}, "2 problems"),
    ],
)
def test_an_unknown_backend_or_option_is_named(backend: Any, message: str, recorder: Recorder, tmp_path: Path) -> None:
    for options in ({"backend": backend}, {"args": make_args(tmp_path, backend=backend)}):
        with pytest.raises(SlothConfigError) as error:
            make_trainer(tmp_path, **options)
        assert message in str(error.value)
    assert recorder.calls == []


def test_all_conflicts_are_listed_and_nothing_is_changed(recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    model._use_kernels = True
    before = (tiny.describe(model), str(vars(tokenizer)), dict(vars(SFTTrainer)), dict(vars(SFTConfig)))
    recorder.problems.append("a plugin's own problem")
    args = make_args(tmp_path, use_liger_kernel=True, activation_offloading=True, backend="sloth")
    with pytest.raises(SlothConfigError) as error:
        make_trainer(tmp_path, model=model, args=args, processing_class=tokenizer)
    named = [
        "SFTConfig(use_liger_kernel=True)",
        "SFTConfig(activation_offloading=True)",
        "use_kernels=True",
        "plugin's",
    ]
    assert len(error.value.problems) == len(named)
    for part, problem in zip(named, error.value.problems, strict=True):
        assert part in problem
        assert "plugin" in problem or "backend='sloth'" in problem
    assert before == (tiny.describe(model), str(vars(tokenizer)), dict(vars(SFTTrainer)), dict(vars(SFTConfig)))
    assert recorder.calls == []


def test_use_kernels_in_model_init_kwargs_is_a_conflict(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    args = make_args(tmp_path, model_init_kwargs={"use_kernels": True}, backend="sloth")
    with pytest.raises(SlothConfigError, match="use_kernels=True of the model"):
        make_trainer(tmp_path, model=str(model_folder), args=args)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_tokenizer_is_mended_before_trl_uses_it(
    by_name: bool, model_folder: Path, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.on_tokenizer = lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>")
    options = {"model": str(model_folder), "processing_class": None} if by_name else {}
    trainer = make_trainer(tmp_path, "text", backend="sloth", **options)
    end = trainer.processing_class.convert_tokens_to_ids("<|im_end|>")
    assert {row["input_ids"][-1] for row in trainer.train_dataset} == {end}
    assert recorder.calls == PHASES


def test_embeddings_are_fixed_before_a_loaded_model_gets_adapters(recorder: Recorder, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, backend="sloth", peft_config=lora())
    assert type(recorder.fixed).__name__ == "LlamaForCausalLM"
    assert not recorder.had_adapters
    assert sloth_backend.report(trainer.model).of(action="changed")


def test_the_defaults_of_trl_hold_where_no_config_is_given(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SFTConfig, "__init__", functools.partialmethod(SFTConfig.__init__, use_cpu=True, bf16=False))
    tokenizer = tiny.make_tokenizer()
    data = tiny.make_dataset()
    SFTTrainer(tiny.make_model(tokenizer), train_dataset=data, processing_class=tokenizer, backend="sloth")
    assert recorder.calls == PHASES
    assert recorder.run.gradient_checkpointing is True


@pytest.mark.parametrize("phase", PHASES)
def test_a_failing_plugin_leaves_the_model_as_trl_made_it(phase: str, recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    models = [tiny.make_model(tokenizer) for _ in range(2)]
    if phase == "patch":
        make_trainer(tmp_path, model=models[0], processing_class=tiny.make_tokenizer())
    recorder.fail_in = phase
    with pytest.raises(
        SlothPluginError, match=rf"plugin 'recorder' failed in sloth_\w*{phase}.* ArithmeticError: as told"
    ):
        make_trainer(tmp_path, model=models[1], processing_class=tokenizer, backend="sloth")
    assert tiny.describe(models[0]) == tiny.describe(models[1])
    assert not [name for name in vars(tokenizer) if name.startswith("_mark")]


def test_an_error_of_trl_surfaces_and_nothing_is_left(recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    before = tiny.describe(model)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make_trainer(tmp_path, model=model, processing_class=tokenizer, train_dataset=None, backend="sloth")
    assert recorder.calls == ["heal", "fix"]
    assert tiny.describe(model) == before
    assert not [name for name in vars(tokenizer) if name.startswith("_mark")]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lerning_rate'"):
        make_trainer(tmp_path, backend="sloth", lerning_rate=1)


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
    assert fused(trainer)
    assert_same_logs(trainer, stock("text", "loaded"))


def test_trl_s_loss_comes_back_where_no_plugin_takes_it(recorder: Recorder, stock: Any, tmp_path: Path) -> None:
    recorder.on_model = lambda model: recorder.calls.append("own" if "forward" not in vars(model) else "trl")
    trainer = make_trainer(tmp_path, backend="sloth")
    assert recorder.calls == [*PHASES, "own"]
    assert vars(trainer.model)["forward"].__func__.__qualname__.startswith("_patch_chunked_ce_lm_head")
    trainer.train()
    assert logs(trainer) == logs(stock("text", "loaded"))


def test_trl_s_loss_stays_where_the_options_exclude_ours(recorder: Recorder, tmp_path: Path) -> None:
    recorder.on_model = lambda model: recorder.calls.append("own" if "forward" not in vars(model) else "trl")
    make_trainer(tmp_path, backend={"kernels": ["rope"]})
    assert recorder.calls == [*PHASES, "trl"]


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


def test_trl_s_fused_head_is_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_trainer, "_patch_chunked_ce_lm_head", add_fused_lm_head)
    trainer = make_trainer(tmp_path, backend="sloth")
    assert vars(trainer.model)["forward"].__func__.__code__.co_name == "_fused_forward"
    assert not fused(trainer)
    skipped = sloth_backend.report(trainer.model).of(action="skipped", capability="linear_cross_entropy")
    assert ("trl", "TRL's own fused head computes the loss") in [(f.plugin, f.reason) for f in skipped]


class OwnTrainer(SFTTrainer):
    """A user's subclass that passes its arguments on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ready = True


@dataclasses.dataclass
class OwnConfig(SFTConfig):
    """A user's subclass with an option of its own."""

    extra: int = 3


def test_subclasses_have_the_switch(recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    options = {"train_dataset": tiny.make_dataset(), "processing_class": tokenizer}
    args = dataclasses.asdict(make_args(tmp_path, backend=None))
    config = OwnConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", backend=SlothConfig(kernels=False))
    assert "backend" in args
    assert OwnTrainer(tiny.make_model(tokenizer), make_args(tmp_path), backend="sloth", **options).ready
    OwnTrainer(tiny.make_model(tokenizer), config, **options)
    assert recorder.calls == PHASES * 2
    assert config.extra == 3
    json.dumps(config.to_dict())


def test_signatures_show_the_switch() -> None:
    for cls in (SFTTrainer, SFTConfig, OwnConfig):
        parameter = inspect.signature(cls).parameters["backend"]
        assert parameter.default is None
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def test_the_field_is_like_any_other(tmp_path: Path) -> None:
    config = make_args(tmp_path, backend=SlothConfig(kernels=("rope",)))
    names = [field.name for field in dataclasses.fields(SFTConfig)]
    assert names.count("backend") == 1
    assert config.backend == {**dataclasses.asdict(SlothConfig()), "kernels": ("rope",)}
    assert f"backend={config.backend}" in repr(config)
    assert json.loads(config.to_json_string())["backend"]["kernels"] == ["rope"]
    assert dataclasses.replace(config, backend="sloth").backend == "sloth"
    assert pickle.loads(pickle.dumps(config)).backend == config.backend
    assert b"sloth_backend" not in pickle.dumps(config)
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, backend="sloth") != config


def test_a_config_pickled_without_the_field_loads(tmp_path: Path) -> None:
    config = make_args(tmp_path)
    del vars(config)["backend"]
    assert pickle.loads(pickle.dumps(config)).backend is None


@pytest.mark.parametrize(
    ("yaml", "arguments", "expected"),
    [
        ("", [], None),
        ("", ["--backend", "sloth"], "sloth"),
        ("", ["--backend", '{"kernels": false}'], {"kernels": False}),
        ("backend: sloth", [], "sloth"),
        ("backend: true", [], True),
        ("backend:\n  kernels: [rope]\n  print_report: false", [], {"kernels": ["rope"], "print_report": False}),
    ],
)
def test_command_line_and_yaml(yaml: str, arguments: list[str], expected: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(f"output_dir: {tmp_path}\nbf16: false\nuse_cpu: true\n{yaml}\n")
    (config,) = TrlParser(SFTConfig).parse_args_and_config(["--config", str(tmp_path / "config.yml"), *arguments])
    assert config.backend == expected


def test_trl_sft_on_the_command_line(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", "messages")
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "max_steps": 2,
        "use_peft": "true",
        "backend": "sloth",
    }
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    script = "import sys; from trl.cli.main import main; sys.argv[0] = 'trl'; main()"
    result = run(script, {**installed, "HF_HOME": str(tmp_path / "cache")}, "sft", *arguments)
    assert "sloth_backend · trl, cpu, float32" in result.stderr
    assert "linear_cross_entropy" in result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
