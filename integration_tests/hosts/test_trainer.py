"""``transformers.Trainer`` with the switch: the losses of stock, on causal language models and on others."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.recorder import Recorder
from integration_tests.hosts.trainer_runs import DEFAULTS, STEPS, seed, values
from integration_tests.hosts.trl_runs import lora_model
from sloth_backend import SlothConfig, SlothConfigError

QUIET: Any = {"print_report": False}
SMALL: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENIZER = tiny.make_tokenizer()


def rows(label: Any = None) -> list[dict[str, Any]]:
    """Twelve tokenised sentences of several lengths, each with ``label(number, token ids)``."""
    tokens = [dict(TOKENIZER(text)) for text in tiny.sentences(12, seed=1)]
    return [{**row, **({"labels": label(i, row["input_ids"])} if label else {})} for i, row in enumerate(tokens)]


def make(model: Any, folder: Path, data: Any = None, *, cls: Any = Trainer, **options: Any) -> Any:
    """A trainer that pads its batches on the right; options of TrainingArguments under ``args``."""
    kind = TrainingArguments if cls is not Seq2SeqTrainer else Seq2SeqTrainingArguments
    args = kind(str(folder), **{**DEFAULTS, "bf16": False, **options.pop("args", {})})
    options.setdefault("data_collator", DataCollatorForLanguageModeling(TOKENIZER, mlm=False))
    return cls(model, args, train_dataset=data or rows(), processing_class=TOKENIZER, **options)


def assert_same(ours: Any, stock: Any) -> None:
    """All that is logged, within what float32 sums in another order differ by."""
    assert len(values(ours)) == len(values(stock)) > STEPS
    for mine, theirs in zip(values(ours), values(stock), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def both(make_model: Any, folder: Path, data: Any = None, **options: Any) -> tuple[Any, Any]:
    """The same run with the switch and without."""
    trainers = []
    for backend in (QUIET, None):
        trainers.append(make(make_model(), folder, data, backend=backend, **options))
        trainers[-1].train()
    return trainers[0], trainers[1]


def llama() -> Any:
    """A causal language model."""
    return tiny.make_model(TOKENIZER)


@pytest.mark.parametrize("model", [llama, lora_model])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_causal_language_model_gets_fused_accumulation_and_the_losses_of_stock(
    model: Any, checkpointing: bool, tmp_path: Path
) -> None:
    args = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 3}
    ours, stock = both(model, tmp_path, args=args)
    assert_same(ours, stock)
    report = sloth_backend.report(ours.model)
    assert report.run.startswith("transformers, cpu, float32")
    for capability, count in (("batch_fusion", 1), ("linear_cross_entropy", 1), ("layer_program", 2)):
        assert len(report.of(action="changed", capability=capability)) == count, str(report)


def test_accumulation_really_passes_together(tmp_path: Path) -> None:
    passes = []
    for backend in (QUIET, None):
        model, shapes = llama(), []
        model.register_forward_pre_hook(lambda m, a, k, s=shapes: s.append(k["input_ids"].shape), with_kwargs=True)
        make(model, tmp_path, backend=backend, args={"max_steps": 2}).train()
        passes.append(shapes)
    fused, single = passes
    assert len(single) == 4
    assert all(rows == 1 for rows, _ in fused)
    lengths = [len(row["input_ids"]) for row in rows()]
    assert sum(length for _, length in fused) < sum(rows * length for rows, length in single)
    assert len(lengths) == 12


def test_evaluation_and_prediction_give_what_stock_gives(tmp_path: Path) -> None:
    def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return {"mean_logit": float(prediction.predictions.mean()), "entries": prediction.predictions.size}

    ours, stock = both(llama, tmp_path, eval_dataset=rows()[:5], compute_metrics=metrics)
    for trainer in (ours, stock):
        trainer.evaluate()
    assert values(ours)[-1]["eval_entries"] > 0
    assert values(ours)[-1] == pytest.approx(values(stock)[-1], rel=1e-4, abs=1e-7)


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make(llama(), tmp_path, backend=QUIET, args=args) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log["loss"] for log in values(resumed)[:STEPS]] == [log["loss"] for log in values(whole)[:STEPS]]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


class Net(nn.Module):
    """No model of transformers: no config, no embeddings that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(400, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> dict[str, Any]:
        """The loss of two classes."""
        logits = self.head(self.words(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _classifier() -> Any:
    config = BertConfig(vocab_size=400, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL)
    return BertForSequenceClassification(config)


def _tagger() -> Any:
    config = llama().config
    config.num_labels = 400
    return LlamaForTokenClassification(config)


def _translator() -> Any:
    sizes: Any = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes, decoder_start_token_id=0, dropout_rate=0.0))


OTHERS = {
    "classifier": (_classifier, lambda i, ids: i % 2, transformers.DataCollatorWithPadding(TOKENIZER)),
    "net": (Net, lambda i, ids: i % 2, transformers.DataCollatorWithPadding(TOKENIZER)),
    "tagger": (_tagger, lambda i, ids: ids, transformers.DataCollatorForTokenClassification(TOKENIZER)),
    "translator": (_translator, lambda i, ids: ids, DataCollatorForSeq2Seq(TOKENIZER)),
}
"""Models that are no causal language models, with labels and collator. The tagger's labels are not shifted."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_train_as_in_stock_and_findings_say_what_they_do_not_gain(name: str, tmp_path: Path) -> None:
    build, label, collator = OTHERS[name]

    def seeded() -> Any:
        torch.manual_seed(0)
        return build()

    ours, stock = both(seeded, tmp_path, rows(label), data_collator=collator)
    assert_same(ours, stock)
    report = sloth_backend.report(ours.model)
    kind = type(ours.model).__name__
    (fusion,) = [f for f in report.of(action="skipped", capability="batch_fusion") if f.plugin == "transformers"]
    assert fusion.reason == f"the labels of a {kind} may not be next tokens"
    (embeddings,) = report.of(action="skipped", capability="embedding_fix")
    assert f"a {kind}, which is no causal language model" in embeddings.reason
    assert not report.of(action="changed", capability="linear_cross_entropy")
    assert not report.of(action="changed", capability="batch_fusion")
    assert bool(report.of(action="changed", capability="layer_program")) is (name == "tagger")
    assert bool(report.of(action="skipped", capability="model")) is (name == "net")
    sloth_backend.undo(ours.model)
    assert not sloth_backend.report(ours.model).findings


def test_the_tokenizer_goes_through_both_phases(recorder: Recorder, tmp_path: Path) -> None:
    seen = []
    recorder.on_tokenizer = seen.append
    make(llama(), tmp_path, backend="sloth")
    assert recorder.calls == ["heal", "fix", "patch"]
    assert seen == [TOKENIZER]


@pytest.mark.parametrize(
    ("place", "backend", "expected"),
    [
        *itertools.product(["keyword", "field"], ["sloth", True, {}], [SlothConfig()]),
        *itertools.product(["keyword", "field"], [SlothConfig(kernels=("rope",))], [SlothConfig(kernels=("rope",))]),
        ("field", '{"kernels": ["rope"]}', SlothConfig(kernels=("rope",))),
        *itertools.product(["keyword", "field"], [None, False, ""], [None]),
    ],
)
def test_every_spelling_of_the_switch(
    place: str, backend: Any, expected: SlothConfig | None, recorder: Recorder, tmp_path: Path
) -> None:
    options = {"backend": backend} if place == "keyword" else {"args": {"backend": backend}}
    trainer = make(llama(), tmp_path, **options)
    assert (recorder.run.config if recorder.run else None) == expected
    assert recorder.calls == (["heal", "fix", "patch"] if expected else [])
    assert isinstance(trainer.args.backend, dict | str | bool | None)


def test_the_keyword_false_overrules_the_field(recorder: Recorder, tmp_path: Path) -> None:
    make(llama(), tmp_path, backend=False, args={"backend": "sloth"})
    make(llama(), tmp_path, cls=Seq2SeqTrainer, backend=False, args={"backend": "sloth"})
    assert recorder.calls == []


class OwnTrainer(Trainer):
    """A user's subclass with a loss of its own."""

    def __init__(self, *args: Any, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = weight

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """A loss from logits that the model gives without labels."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = self.weight * nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_has_the_switch_and_keeps_its_loss(tmp_path: Path) -> None:
    ours, stock = both(llama, tmp_path, cls=OwnTrainer, weight=0.5)
    assert_same(ours, stock)
    report = sloth_backend.report(ours.model)
    assert report.of(action="changed", capability="layer_program")
    (fusion,) = report.of(action="skipped", capability="batch_fusion")
    assert fusion.reason == "OwnTrainer has a compute_loss of its own"


class HidesBackend(Trainer):
    """A user's subclass that calls something else ``backend``."""

    def __init__(self, *args: Any, backend: str = "nccl", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend


@dataclasses.dataclass
class HidesField(TrainingArguments):
    """A user's configuration with a field ``backend`` of its own meaning."""

    backend: str = "nccl"


def test_what_users_call_backend_stays_theirs(recorder: Recorder, tmp_path: Path) -> None:
    assert make(llama(), tmp_path, cls=HidesBackend, backend="sloth").backend == "sloth"
    args = HidesField(str(tmp_path), **DEFAULTS)
    Trainer(llama(), args, train_dataset=rows(), processing_class=TOKENIZER)
    assert args.backend == "nccl"
    assert recorder.calls == []
    Trainer(llama(), args, train_dataset=rows(), processing_class=TOKENIZER, backend="sloth")
    assert recorder.calls == ["heal", "fix", "patch"]


def test_a_model_that_is_made_in_train_is_refused(tmp_path: Path) -> None:
    options = {"model_init": llama, "backend": "sloth"}
    with pytest.raises(SlothConfigError, match=r"model_init makes another model .*sloth_backend\.optimize"):
        make(None, tmp_path, **options)
    make(None, tmp_path, model_init=llama)


def test_conflicts_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    models = [llama(), llama()]
    with pytest.raises(SlothConfigError, match="2 problems"):
        make(models[0], tmp_path, backend="sloth", args={"use_liger_kernel": True, "torch_compile": True})
    assert tiny.describe(models[0]) == tiny.describe(models[1])


def test_signatures_show_the_switch() -> None:
    for cls in (Trainer, Seq2SeqTrainer, TrainingArguments, Seq2SeqTrainingArguments, OwnTrainer):
        parameters = inspect.signature(cls).parameters
        assert "backend" in parameters or cls is OwnTrainer
    assert inspect.signature(TrainingArguments).parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    (arguments,) = transformers.HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "true", "--backend", '{"kernels": false}']
    )
    assert arguments.backend == {"kernels": False}


def test_two_models_in_one_process_do_not_touch_each_other(tmp_path: Path) -> None:
    """One trains with the backend; another, made while it is switched on, trains as if it were alone."""
    alone = make(llama(), tmp_path)
    ours, stock = make(llama(), tmp_path, backend=QUIET), make(llama(), tmp_path)
    assert tiny.describe(stock.model) == tiny.describe(alone.model) != tiny.describe(ours.model)
    for trainer in (alone, ours, stock):
        seed()
        trainer.train()
    assert values(stock) == values(alone)
    assert not sloth_backend.report(stock.model).findings
