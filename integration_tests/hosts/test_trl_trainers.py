"""TRL's trainers of preferences, rewards and policies with the switch: the numbers of the same trainer without it."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from trl import DPOTrainer
from trl.experimental.kto import KTOConfig as OldKTOConfig
from trl.experimental.kto import KTOTrainer as OldKTOTrainer
from trl.models import unwrap_model_for_generation

import sloth_backend
from integration_tests import tiny
from integration_tests.child import lines, run
from integration_tests.hosts import trainer_runs
from integration_tests.hosts.recorder import PHASES, Recorder
from integration_tests.hosts.trainer_runs import CASES, DEFAULTS, assert_same, both, make, seed, values
from sloth_backend import SlothConfig, SlothConfigError, SlothPluginError
from sloth_backend.hosts import switch
from sloth_backend.hosts.trl import KINDS

QUIET: Any = {"print_report": False}
GENERATING = ("GRPO", "RLOO")
WITH_REFERENCE = ("DPO", "KTO", *GENERATING, "Distillation")
GAINS = {"layer_program", "rms_norm", "rope", "glu", "step_overhead", "documents", "memory_plan"}
"""What every one of these trainers gains on a Llama; docs/hosts-trl.md has the table."""


@pytest.mark.parametrize(
    ("name", "peft"),
    [
        *((name, "") for name in CASES),
        *((name, "config") for name in ("DPO", "KTO", "Reward", "GRPO")),
        *((name, "model") for name in ("DPO", "GRPO")),
    ],
)
def test_everything_that_is_logged_is_what_stock_logs(name: str, peft: str, tmp_path: Path) -> None:
    """Losses, log-probabilities, rewards, KL to the reference; of what is generated, its rewards and lengths."""
    ours, stock = both(name, tmp_path, peft=peft)
    assert_same(ours, stock, CASES[name].watched)
    assert_gains(name, ours)
    with_own = name in WITH_REFERENCE and not peft
    assert bool(sloth_backend.report(ours.model).of(action="changed", capability="reference_model")) is with_own


def assert_gains(name: str, trainer: Any) -> None:
    """All layers changed, and what is left out has a Finding that says why."""
    report = sloth_backend.report(trainer.model)
    changed = {finding.capability for finding in report.of(action="changed")}
    assert changed - {"reference_model"} == GAINS
    assert len(report.of(action="changed", capability="layer_program")) == 2
    (loss,) = report.of(action="skipped", capability="linear_cross_entropy")
    assert loss.reason.startswith(f"{type(trainer).__name__} {'compares' if name == 'Reward' else 'takes'}")
    (fusion,) = report.of(action="skipped", capability="batch_fusion")
    scores = trainer.model.get_output_embeddings() is None
    assert ("its labels are no tokens" if scores else f"{type(trainer).__name__} has a ") in fusion.reason


@pytest.mark.parametrize(("name", "peft"), [("GRPO", ""), ("GRPO", "config"), ("RLOO", "")])
def test_greedy_tokens_and_their_log_probabilities_are_those_of_stock(name: str, peft: str, tmp_path: Path) -> None:
    """In the middle of training, for prompts of several lengths, padded on the left."""
    ours, stock = both(name, tmp_path, peft=peft, args={"max_steps": 1, "learning_rate": 2e-2})
    tokenizer = stock.processing_class
    tokenizer.padding_side = "left"
    batch = tokenizer(tiny.sentences(4, seed=5), return_tensors="pt", padding=True)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    answers = [_generate(trainer, batch) for trainer in (ours, stock)]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    logps, expected = (torch.stack(answer.scores).log_softmax(-1) for answer in answers)
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    again, scored = (_scored(trainer.model, answers[1].sequences, batch) for trainer in (ours, stock))
    torch.testing.assert_close(again, scored, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scored, expected.transpose(0, 1), rtol=1e-4, atol=1e-4)


def _generate(trainer: Any, batch: Any) -> Any:
    """As TRL does it between two passes of training: with checkpointing off, which would do without the cache."""
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        assert model.training
        return model.generate(**batch, **options, output_scores=True, return_dict_in_generate=True)


def _scored(model: Any, sequences: torch.Tensor, batch: Any) -> torch.Tensor:
    """Log-probabilities (rows, 10, vocabulary) of one pass over prompt and answer; the eos token cannot come."""
    mask = torch.cat([batch["attention_mask"], torch.ones(len(sequences), 10, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits[:, -11:-1]
    logits[..., model.generation_config.eos_token_id] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_reference_log_probabilities_may_be_computed_before(name: str, tmp_path: Path) -> None:
    ours, stock = both(name, tmp_path, args={"precompute_ref_log_probs": True})
    assert_same(ours, stock, CASES[name].watched)


def test_a_reference_model_that_is_given_runs_on_the_same_kernels_and_is_undone_with_the_trained_one(
    tmp_path: Path,
) -> None:
    tokenizer = tiny.make_tokenizer()
    references = [tiny.make_model(tokenizer, seed=1) for _ in range(3)]
    options = [{"ref_model": reference} for reference in references[:2]]
    trainers = []
    for backend, option in zip((QUIET, None), options, strict=True):
        trainers.append(make("DPO", tmp_path / str(backend is None), backend=backend, **option))
        trainers[-1].train()
    assert_same(*trainers, watched=CASES["DPO"].watched)
    assert values(trainers[0])[0]["rewards/chosen"] != 0.0
    assert len(sloth_backend.report(references[0]).of(action="changed", capability="layer_program")) == 2
    assert not sloth_backend.report(references[1]).findings
    sloth_backend.undo(trainers[0].model)
    assert tiny.describe(references[0]) == tiny.describe(references[1])
    assert not sloth_backend.report(references[0]).findings


def test_the_trained_model_does_not_keep_its_reference_alive(tmp_path: Path) -> None:
    trainer = make("DPO", tmp_path, backend=QUIET)
    model, reference = trainer.model, weakref.ref(trainer.ref_model)
    trainer.ref_model = None
    trainer.callback_handler.callbacks.clear()
    trainer.accelerator.free_memory()
    gc.collect()
    assert reference() is None
    sloth_backend.undo(model)


@pytest.mark.parametrize("peft", ["", "config", "model"])
def test_undo_restores_every_attribute_of_every_module(peft: str, tmp_path: Path) -> None:
    for name in ("DPO", "Reward"):
        models = [make(name, tmp_path / f"{name}{b}", peft=peft, backend=b).model for b in (QUIET, None)]
        assert tiny.describe(models[0]) != tiny.describe(models[1])
        sloth_backend.undo(models[0])
        assert _describe(models[0]) == _describe(models[1])


def _describe(model: Any) -> Any:
    """What a module holds, without where the model was loaded from."""
    description = tiny.describe(model)
    for attributes in description.values():
        attributes.pop("name_or_path", None)
    return description


@pytest.mark.parametrize("name", ["DPO", "ORPO", "Reward"])
def test_evaluation_gives_what_stock_gives(name: str, tmp_path: Path) -> None:
    data = trainer_runs.texts(CASES[name].columns, 6)
    ours, stock = both(name, tmp_path, eval_dataset=data, args={"max_steps": 1})
    for trainer in (ours, stock):
        seed()
        trainer.evaluate()
    assert any(key.startswith("eval_") for key in values(ours)[-1])
    assert values(ours)[-1] == pytest.approx(values(stock)[-1], rel=1e-4, abs=2e-5)


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"peft": "config", "backend": QUIET, "args": {"save_strategy": "steps", "save_steps": 2}}
    whole, resumed = (make("DPO", tmp_path, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    kept = ("loss", "rewards/chosen", "logps/rejected")
    assert [{k: log[k] for k in kept} for log in values(resumed)[:3]] == [
        {k: log[k] for k in kept} for log in values(whole)[:3]
    ]
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("place", ["keyword", "field"])
@pytest.mark.parametrize("name", CASES)
def test_keyword_and_field(name: str, place: str, recorder: Recorder, tmp_path: Path) -> None:
    backend = {"kernels": ["rope", "linear_cross_entropy"]}
    options: Any = {"backend": backend} if place == "keyword" else {"args": {"backend": backend}}
    trainer = make(name, tmp_path, **options)
    # A model that is no causal one has no phase B, and a reference model has its own.
    expected = ["heal", *PHASES[1:]] if name != "Reward" else ["heal", "patch"]
    reference = getattr(trainer, "teacher_model" if name == "Distillation" else "ref_model", None)
    assert recorder.calls == expected + (["fix", "patch"] if reference is not None else [])
    assert recorder.run.host == "trl"
    assert recorder.run.config.kernels == ("rope",)
    assert inspect.signature(CASES[name].trainer).parameters["backend"].default is None
    assert inspect.signature(CASES[name].config).parameters["backend"].default is None


@pytest.mark.parametrize("name", ["DPO", "Reward", "GRPO"])
def test_off_means_off(name: str, recorder: Recorder, tmp_path: Path) -> None:
    make(name, tmp_path, backend=None)
    make(name, tmp_path, backend=False, args={"backend": "sloth"})
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("name", "tokens"), [("DPO", 2 * 2 * 16), ("KTO", 2 * 16), ("Reward", 2 * 2 * 1024), ("ORPO", 2 * 2 * 1024)]
)
def test_the_most_tokens_of_a_pass_are_known(name: str, tokens: int, recorder: Recorder, tmp_path: Path) -> None:
    args = {"max_length": 16} if name in ("DPO", "KTO") else {}
    trainer = make(name, tmp_path, backend=QUIET, args=args)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )
    trainer.train()
    assert recorder.run.tokens_per_pass == tokens
    assert 0 < max(seen) <= tokens


@pytest.mark.parametrize("name", ["DPO", "GRPO", "ORPO"])
def test_a_model_and_tokenizer_given_by_name_train_as_they_do_in_trl(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    ours, stock = both(name, tmp_path, model=str(model_folder), processing_class=None)
    assert_same(ours, stock, CASES[name].watched)
    assert_gains(name, ours)
    sides = [(t.processing_class.padding_side, t.processing_class.truncation_side) for t in (ours, stock)]
    assert sides[0] == sides[1]


def test_a_reward_model_given_by_name_is_loaded_and_trained_as_in_trl(model_folder: Path, tmp_path: Path) -> None:
    ours, stock = both("Reward", tmp_path, model=str(model_folder), processing_class=None)
    assert_same(ours, stock, CASES["Reward"].watched)
    assert_gains("Reward", ours)


class OwnDPO(DPOTrainer):
    """A user's subclass with a loss of its own on top."""

    def __init__(self, *args: Any, extra: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Twice the loss."""
        result = super().compute_loss(*args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


def test_a_subclass_has_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "DPO", CASES["DPO"]._replace(trainer=OwnDPO))
    ours, stock = both("DPO", tmp_path, extra=2.0)
    assert ours.extra == 2.0
    assert_same(ours, stock, CASES["DPO"].watched)
    assert sloth_backend.report(ours.model).of(action="changed", capability="layer_program")


def test_the_old_path_of_a_trainer_has_the_switch(recorder: Recorder, tmp_path: Path) -> None:
    source, data = tiny.save(tmp_path / "model"), trainer_runs.texts(CASES["KTO"].columns)
    with pytest.warns(FutureWarning):
        args = OldKTOConfig(str(tmp_path / "out"), **DEFAULTS)
    with pytest.warns(FutureWarning):
        OldKTOTrainer(str(source), args=args, train_dataset=data, backend="sloth")
    assert recorder.calls == [*PHASES, "fix", "patch"]


@pytest.mark.parametrize("phase", ["heal", "fix", "patch"])
def test_a_failing_plugin_leaves_both_models_as_they_were(phase: str, recorder: Recorder, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    policy, reference, untouched = (tiny.make_model(tokenizer) for _ in range(3))

    def fail_at_reference(model: Any) -> None:
        if model is reference:
            raise ArithmeticError("as told")

    recorder.on_model = fail_at_reference
    recorder.fail_in = phase if phase != "patch" else ""
    with pytest.raises(SlothPluginError, match="as told"):
        make("DPO", tmp_path, model=policy, ref_model=reference, processing_class=tokenizer, backend="sloth")
    for model in (policy, reference):
        left = [name for m in model.modules() for name in vars(m) if "_mark" in name or "sloth" in name]
        assert left == []
    for own in ("_is_accelerate_prepared", "forward"):  # accelerate's mark since 1.15, TRL's head since 1.16
        vars(reference).pop(own, None)
    assert tiny.describe(reference) == tiny.describe(untouched)


def test_conflicts_are_listed_before_anything_is_changed(tmp_path: Path) -> None:
    with pytest.raises(SlothConfigError, match=r"use_liger_kernel=True cannot be combined with kernels=True"):
        make("DPO", tmp_path, backend="sloth", args={"use_liger_kernel": True})
    with pytest.raises(SlothConfigError, match=r"DPOTrainer\(backend='slot'\)|unknown backend 'slot'"):
        make("DPO", tmp_path, backend="slot")
    with pytest.raises(SlothConfigError, match=r"DPOTrainer\(backend=.*\) and DPOConfig\(backend=.*\) differ"):
        make("DPO", tmp_path, backend="sloth", args={"backend": {"kernels": False}})


def test_kernels_false_leaves_no_finding_of_the_loss(tmp_path: Path) -> None:
    trainer = make("DPO", tmp_path, backend=SlothConfig(kernels=False, print_report=False))
    findings = sloth_backend.report(trainer.model).of(capability="linear_cross_entropy")
    assert [finding for finding in findings if finding.plugin == "trl"] == []


def test_a_trainer_that_is_not_listed_is_switched_on_by_its_field(tmp_path: Path) -> None:
    """It has no keyword, and has tokenised before its tokenizer comes to Trainer."""
    pytest.importorskip("trl.experimental.bco")  # not in TRL 1.14
    from trl.experimental.bco import BCOConfig, BCOTrainer

    trainers = []
    for backend in (QUIET, None):
        folder = tmp_path / str(backend is None)
        tokenizer = tiny.make_tokenizer()
        models = [tiny.make_model(tokenizer) for _ in range(2)]
        args = BCOConfig(str(folder), backend=backend, remove_unused_columns=False, **DEFAULTS)
        data = trainer_runs.texts(CASES["KTO"].columns)
        trainers.append(BCOTrainer(*models, args, train_dataset=data, processing_class=tokenizer))
        seed()
        trainers[-1].train()
    assert_same(*trainers, watched=("loss", "rewards/chosen"))
    report = sloth_backend.report(trainers[0].model)
    assert len(report.of(action="changed", capability="layer_program")) == 2
    assert not report.of(action="changed", capability="tokenizer_healing")


CHECK = """
    import inspect, sys
    heavy = {"sloth_backend.phases", "sloth_backend.config", "sloth_kernels", "pluggy"} & sys.modules.keys()
    assert not heavy, heavy
    from sloth_backend import autoload
    assert autoload.status().errors == {}, autoload.status()
    import trl
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer, ORPOConfig
    names = ["DPO", "KTO", "Reward", "GRPO", "RLOO", "SFT"]
    classes = [getattr(trl, f"{name}{part}") for name in names for part in ("Trainer", "Config")]
    for cls in (*classes, CPOTrainer, ORPOTrainer, ORPOConfig):
        assert list(inspect.signature(cls).parameters).count("backend") == 1, cls
    assert trl.DPOConfig("out", use_cpu=True, bf16=False, backend="sloth").backend == "sloth"
"""


def test_the_switch_is_there_although_a_trainer_is_imported_first(lean: dict[str, str]) -> None:
    run(lines("from trl.experimental.orpo import ORPOTrainer", CHECK), lean)


@dataclasses.dataclass
class Base:
    """Stands for TrainingArguments in a process that imports this package late."""

    out: str = ""
    _VALID_DICT_FIELDS = ["other"]

    def __post_init__(self) -> None: ...


@dataclasses.dataclass
class Derived(Base):
    """Made before the field is there."""

    extra: int = 0


@dataclasses.dataclass
class Own(Derived):
    """Has a field of that name already."""

    backend: str = "mine"


def test_configurations_derived_before_the_field_is_there_get_it_too() -> None:
    for _ in range(2):
        switch.add_field(Base)
    made: Any = Derived
    config = made("out", 3, backend=SlothConfig(kernels=False))
    assert (config.out, config.extra, config.backend) == ("out", 3, dataclasses.asdict(SlothConfig(kernels=False)))
    assert f"backend={config.backend}" in repr(config)
    assert config == dataclasses.replace(config) != dataclasses.replace(config, backend=None)
    assert [switch.is_ours(cls) for cls in (Base, Derived, Own)] == [True, True, False]
    assert Own("out").backend == "mine"
    assert made._VALID_DICT_FIELDS == ["other", "backend"]


def test_the_stable_trainers_of_this_trl_are_all_known() -> None:
    known = {kind.trainer for kind in KINDS.values()}
    assert {name for name in trl._import_structure["trainer"] if name.endswith("Trainer")} <= known
