"""The switch in TRL: every way to say it, when each phase runs, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers
from trl import SFTConfig, SFTTrainer, TrlParser

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.recorder import PHASES, Recorder
from integration_tests.hosts.trl_runs import lora, make_args, make_trainer
from sloth_backend import SlothConfig, SlothConfigError, SlothPluginError
from sloth_backend.hosts import switch

OPTIONS = SlothConfig(offload_keep_last=3)
SPELLINGS = [
    ("trainer", "sloth", SlothConfig()),
    ("trainer", True, SlothConfig()),
    ("trainer", {"kernels": False}, SlothConfig(kernels=False)),
    ("trainer", OPTIONS, OPTIONS),
    ("config", "sloth", SlothConfig()),
    ("config", True, SlothConfig()),
    ("config", {}, SlothConfig()),
    ("config", OPTIONS, OPTIONS),
    ("config", '{"kernels": ["rope"]}', SlothConfig(kernels=("rope",))),
]


@pytest.mark.parametrize(("place", "backend", "expected"), SPELLINGS, ids=str)
def test_every_spelling_of_the_switch(
    place: str, backend: Any, expected: SlothConfig, recorder: Recorder, tmp_path: Path
) -> None:
    if place == "config":
        trainer = make_trainer(tmp_path, args=make_args(tmp_path, backend=backend))
    else:
        trainer = make_trainer(tmp_path, backend=backend)
    assert recorder.calls == PHASES
    assert recorder.run.config == expected
    assert (recorder.run.host, recorder.run.gradient_checkpointing) == ("trl", True)
    own = [finding.subject for finding in sloth_backend.report(trainer.model).findings if finding.plugin == "recorder"]
    assert own == PHASES


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
    fights = {"use_liger_kernel": True, "torch_compile": True, "activation_offloading": True}
    args = make_args(tmp_path, backend="sloth", **fights)
    with pytest.raises(SlothConfigError) as error:
        make_trainer(tmp_path, model=model, args=args, processing_class=tokenizer)
    expected = [
        ("use_liger_kernel=True", "kernels=False"),
        ("use_kernels=True", "kernels=False"),
        ("torch_compile=True", "kernels=False"),
        ("activation_offloading=True", "checkpointing='host'"),
        ("plugin's own", "problem"),
    ]
    assert len(error.value.problems) == len(expected)
    for (option, remedy), problem in zip(expected, error.value.problems, strict=True):
        assert option in problem
        assert remedy in problem
    assert before == (tiny.describe(model), str(vars(tokenizer)), dict(vars(SFTTrainer)), dict(vars(SFTConfig)))
    assert recorder.calls == []


def test_the_remedies_of_conflicts_work(recorder: Recorder, tmp_path: Path) -> None:
    args = make_args(tmp_path, torch_compile=True, backend={"kernels": False})
    make_trainer(tmp_path, args=args)
    assert recorder.calls == PHASES


def test_use_kernels_in_model_init_kwargs_is_a_conflict(model_folder: Path, recorder: Recorder, tmp_path: Path) -> None:
    args = make_args(tmp_path, model_init_kwargs={"use_kernels": True}, backend="sloth")
    with pytest.raises(SlothConfigError, match="use_kernels=True cannot be combined with kernels=True"):
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
    assert recorder.run.tokens_per_pass == SFTConfig.per_device_train_batch_size * 1024


def test_plain_training_arguments_do(recorder: Recorder, tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=False)
    make_trainer(tmp_path, args=args, backend="sloth")
    assert recorder.calls == PHASES
    assert recorder.run.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"max_length": 48}, 3 * 48),
        ({"max_length": 48, "packing": True}, 3 * 48),
        ({"max_length": 50, "pad_to_multiple_of": 16}, 3 * 64),
        ({"max_length": None}, None),
        ({"max_length": 48, "gradient_accumulation_steps": 4}, 3 * 48),
    ],
)
def test_the_most_tokens_of_a_pass_are_known(
    options: dict[str, Any], tokens: int | None, recorder: Recorder, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, args=make_args(tmp_path, backend="sloth", per_device_train_batch_size=3, **options)
    )
    assert recorder.run.tokens_per_pass == tokens
    largest = max(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
    assert tokens is None or 0 < largest <= tokens


@pytest.mark.parametrize("phase", PHASES)
def test_a_failing_plugin_leaves_the_model_as_trl_made_it(phase: str, recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    models = [tiny.make_model(tokenizer) for _ in range(2)]
    if phase == "patch":
        make_trainer(tmp_path, model=models[0], processing_class=tiny.make_tokenizer())
    recorder.fail_in = phase
    message = rf"plugin 'recorder' failed in sloth_\w*{phase}.* ArithmeticError: as told"
    with pytest.raises(SlothPluginError, match=message):
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


def test_parsers_of_derived_configs_have_the_option(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (config,) = transformers.HfArgumentParser(OwnConfig).parse_args_into_dataclasses(
        [*arguments, "--backend", '{"kernels": false}', "--extra", "5"]
    )
    assert (config.backend, config.extra) == ({"kernels": False}, 5)


def test_classes_that_have_moved_are_refused_whole() -> None:
    class Unknown:
        def __init__(self, net: Any) -> None: ...

    class Taken:
        def __init__(self, model: Any, args: Any, backend: Any) -> None: ...

    @dataclasses.dataclass
    class TakenConfig:
        backend: str = "theirs"

    for cls in (Unknown, Taken):
        original = cls.__init__
        with pytest.raises(RuntimeError, match=f"the signature of {cls.__name__} is not one that this adapter knows"):
            switch.add_keyword(cls, {"model", "args"}, print)
        assert cls.__init__ is original
    with pytest.raises(RuntimeError, match="TakenConfig has a field named 'backend' of its own"):
        switch.add_field(TakenConfig)
    assert TakenConfig().backend == "theirs"
