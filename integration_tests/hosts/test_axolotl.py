"""Training through Axolotl's Python API with the backend on: the host's numbers, and when each phase runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

import torch
import transformers
import yaml

import sloth_backend
from integration_tests import tiny
from integration_tests.docs.snippets import snippet
from integration_tests.hosts import axolotl_runs
from integration_tests.hosts.axolotl_runs import STOCK, Outcome, options, train
from integration_tests.hosts.recorder import PHASES, Recorder
from sloth_backend import SlothConfigError, SlothPluginError, phases
from sloth_backend.hosts import trainers
from sloth_backend.hosts.axolotl import HEALED, SlothPlugin

QUIET = {"sloth": {"print_report": False}}
PAIRS = {
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}
VERDICTS = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {"type": PAIRS, "rows": "pairs"},
    "kto": {"type": VERDICTS, "rows": "labelled"},
    "orpo": {"type": "chat_template.argilla", "rows": "chats"},
}
"""What Axolotl's data are for each way to learn from preferences."""
FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"gradient_checkpointing": True},
    "packing": {"sample_packing": True},
}
SLOW_KINDS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full_packing": {**FULL, "sample_packing": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
    "evaluation": {"val_set_size": 0.2, "eval_steps": 2, "eval_strategy": "steps"},
    "packed_evaluation": {"val_set_size": 0.3, "eval_steps": 2, "eval_strategy": "steps", "sample_packing": True},
    "dpo": {"rl": "dpo"},
    "dpo_full": {"rl": "dpo", **FULL},
    "kto": {"rl": "kto", "remove_unused_columns": False},
    "orpo": {"rl": "orpo", "chat_template": "chatml", "remove_unused_columns": False},
}


def of_kind(folder: Path, model: Path, kind: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The options of a run of one of ``KINDS``."""
    data: dict[str, Any] = {}
    if kind.get("rl"):
        wanted = PREFERENCES[kind["rl"]]
        path = str(axolotl_runs.rows(folder, wanted["rows"]))
        data["datasets"] = [{"path": path, "ds_type": "json", "type": wanted["type"], "split": "train"}]
    return options(folder, model, **{**data, **kind, **changes})


def assert_all_layers_changed(run: Outcome) -> None:
    """Each layer of the model, its loss and its last norm run on ours."""
    report = sloth_backend.report(run.model)
    changed = {finding.subject for finding in report.of(action="changed")}
    layers = {f"model.layers.{i}" for i in range(2)}
    assert layers | {"model.norm", "loss", "attention"} <= changed, str(report)


def compare(folder: Path, model: Path, kind: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """The same run with and without the switch, which must log the same."""
    given = of_kind(folder, model, kind)
    stock = train({**given, **(STOCK if kind.get("adapter", "lora") else {})})
    ours = train({**given, **QUIET, "use_unsloth": True, "output_dir": str(folder / "ours")})
    axolotl_runs.assert_same_logs(ours, stock)
    assert not sloth_backend.report(stock.model).findings
    assert ours.trainer.model_accepts_loss_kwargs == stock.trainer.model_accepts_loss_kwargs
    assert type(ours.trainer) is type(stock.trainer)
    return ours, stock


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_axolotl(kind: str, model_folder: Path, tmp_path: Path) -> None:
    ours, _ = compare(tmp_path, model_folder, KINDS[kind])
    assert_all_layers_changed(ours)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_losses_of_other_kinds_are_those_of_axolotl(kind: str, model_folder: Path, tmp_path: Path) -> None:
    # bitsandbytes' CPU kernels make other values of 4-bit rows that are no whole blocks.
    folder = tiny.save(tmp_path / "whole", hidden_size=64, intermediate_size=128) if kind == "qlora" else model_folder
    ours, _ = compare(tmp_path, folder, SLOW_KINDS[kind])
    report = sloth_backend.report(ours.model)
    assert report.of(action="changed", capability="rms_norm"), str(report)


@pytest.mark.slow
def test_the_options_on_the_page_train(model_folder: Path, tmp_path: Path) -> None:
    stock = train(options(tmp_path, model_folder, **STOCK))
    said = yaml.safe_load(snippet("docs/hosts-axolotl.md", "use_sloth:"))
    ours = train(options(tmp_path, model_folder, **said, output_dir=str(tmp_path / "ours")))
    axolotl_runs.assert_same_logs(ours, stock)
    capabilities = {finding.capability for finding in sloth_backend.report(ours.model).of(action="changed")}
    assert set(said["sloth"]["kernels"]) <= capabilities
    assert "linear_cross_entropy" not in capabilities


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_where_the_whole_one_does(model_folder: Path, tmp_path: Path) -> None:
    given = options(tmp_path, model_folder, **QUIET, use_sloth=True, save_strategy="steps", save_steps=2)
    whole = train(given)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    rest = train({**given, "output_dir": str(tmp_path / "rest"), "resume_from_checkpoint": checkpoint})
    assert_all_layers_changed(rest)
    assert rest.trainer.state.global_step == whole.trainer.state.global_step
    assert rest.logs[-2]["loss"] == pytest.approx(whole.logs[-2]["loss"], rel=1e-6)


@pytest.mark.parametrize("switch", [{"use_unsloth": True}, {"use_sloth": True, "sloth": {"kernels": ["glu"]}}])
def test_inference_generates_what_axolotl_does(
    switch: dict[str, Any], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what ``axolotl inference`` calls."""
    from axolotl.cli.config import load_cfg
    from axolotl.cli.utils import load_model_and_tokenizer

    found = []
    for name, keys in (("stock", STOCK), ("ours", switch)):
        config = axolotl_runs.write(tmp_path / f"{name}.yml", options(tmp_path, model_folder, **keys))
        cfg = load_cfg(str(config), inference=True, rl=None)
        transformers.set_seed(3)
        model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
        batch = tokenizer("the quick brown fox", return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        found.append((model, logits, model.generate(**batch, do_sample=False, max_new_tokens=12)))
    (plain, expected, tokens), (model, logits, ours) = found
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, tokens)
    capabilities = {finding.capability for finding in sloth_backend.report(model).of(action="changed")}
    kernels = set(switch.get("sloth", {}).get("kernels", ("rms_norm", "rope", "glu")))
    assert capabilities & {"rms_norm", "rope", "glu"} == kernels
    assert not capabilities & {"linear_cross_entropy", "batch_fusion"}
    assert not sloth_backend.report(plain).findings
    assert "sloth_backend · axolotl, cpu, float32" in capsys.readouterr().err


def test_each_phase_runs_at_its_time(recorder: Recorder, model_folder: Path, tmp_path: Path) -> None:
    run = train(options(tmp_path, model_folder, use_sloth=True, sloth={"memory": "least"}))
    assert recorder.calls == ["heal", *PHASES]  # Axolotl loads the tokenizer for the data, and again for the model
    assert type(recorder.fixed).__name__ == "LlamaForCausalLM"
    assert not recorder.had_adapters
    assert (recorder.run.host, recorder.run.gradient_checkpointing) == ("axolotl", False)
    assert recorder.run.tokens_per_pass == 2 * 256
    assert recorder.run.config.memory == "least"
    own = [finding.subject for finding in sloth_backend.report(run.model).findings if finding.plugin == "recorder"]
    assert own == PHASES


def test_the_tokenizer_is_mended_before_axolotl_tokenises(
    recorder: Recorder, model_folder: Path, tmp_path: Path
) -> None:
    recorder.on_tokenizer = lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>")
    given = options(tmp_path, model_folder, **STOCK, dataset_prepared_path=str(tmp_path / "prepared"))
    ends, mended = [], tiny.make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for switch in ({}, {"use_sloth": True}, {}):
        cfg = axolotl_runs.load({**given, **switch})
        ends.append({row["input_ids"][-1] for row in axolotl_runs.data(cfg).train_dataset})
        assert (HEALED in cfg) is bool(switch)
    assert ends[1] == {mended}
    assert ends[0] == ends[2] == {tiny.make_tokenizer().eos_token_id}  # prepared data are not taken for each other
    assert recorder.calls == ["heal"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_failing_phase_ends_the_run_and_leaves_nothing(
    phase: str, recorder: Recorder, model_folder: Path, tmp_path: Path
) -> None:
    recorder.fail_in = phase
    kept: list[Any] = []
    recorder.on_tokenizer = kept.append
    with pytest.raises(SlothPluginError, match=rf"plugin 'recorder' failed in sloth_\w*{phase}"):
        train(options(tmp_path, model_folder, use_sloth=True))
    kept += [recorder.fixed] if recorder.fixed is not None else []
    assert not [name for target in kept[-2:] for name in vars(target) if name.startswith("_mark")]


def test_a_way_to_spread_that_is_refused_leaves_nothing(
    recorder: Recorder, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known once the trainer is there, after two phases have run."""

    def refuse(session: Any, trainer: Any) -> None:
        raise SlothConfigError(["as told"])

    monkeypatch.setattr(trainers, "check_sharding", refuse)
    with pytest.raises(SlothConfigError, match="as told"):
        train(options(tmp_path, model_folder, use_sloth=True))
    assert set(recorder.calls) == set(PHASES[:2])
    assert not [name for name in vars(recorder.fixed) if name.startswith(("_mark", phases.ATTRIBUTE))]


def test_hooks_leave_other_configurations_alone(recorder: Recorder, model_folder: Path, tmp_path: Path) -> None:
    cfg = axolotl_runs.load(options(tmp_path, model_folder, **STOCK, use_sloth=False))
    before = copy.deepcopy(dict(cfg))
    plugin = SlothPlugin()
    plugin.register(cfg)
    plugin.pre_lora_load(cfg, tiny.make_model(tiny.make_tokenizer()))
    plugin.post_trainer_create(cfg, None)
    assert dict(cfg) == before
    assert recorder.calls == []
