"""Each host with its switch against itself without, on a CUDA GPU: LoRA in bfloat16 and over 4-bit weights.

A model of four layers learns a few rows by heart, so that steps that go wrong show in the losses after them.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.accelerate_runs import EXAMPLE, make_batches, switched
from integration_tests.hosts.accelerate_runs import train as train_loop
from integration_tests.hosts.trl_runs import lora
from sloth_backend import autoload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
autoload.install()

CUDA = torch.cuda.is_available()
STEPS, LAYERS = 12, [f"model.layers.{i}" for i in range(4)]
QUIET = {"print_report": False}
RATE, RELATIVE, FALL = 2e-3, 5e-3, 0.02
"""Learning rate, at which rounding does not grow in so few steps; how far a loss in bfloat16 may be from that without
the switch, of itself; and how far the losses fall at least."""
OPTIONS: dict[str, Any] = {
    "use_cpu": not CUDA,
    "bf16": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": STEPS,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
Outcome = tuple[list[float], Any]
"""The losses of a run, and its model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model wide enough for blocks of 4-bit weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": len(LAYERS)}
    return tiny.save(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(autouse=True)
def _fresh_accelerators() -> Iterator[None]:
    """Accelerate keeps what the first one in the process was told."""
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=not CUDA)  # Axolotl keeps one for the life of the process


def loading(bits: int) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0 if CUDA else "cpu"}}
    if bits == 4:
        given["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return given


def adapted(folder: Path, bits: int) -> Any:
    """The model with adapters, the same in every run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading(bits))
    torch.manual_seed(0)
    return get_peft_model(model, lora(r=8))


def losses_of(trainer: Any) -> list[float]:
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def sft(folder: Path, work: Path, bits: int, on: bool) -> Outcome:
    """TRL, the model and its adapters by name."""
    args = SFTConfig(str(work), model_init_kwargs=loading(bits), **OPTIONS)
    torch.manual_seed(0)
    switch: dict[str, Any] = {"backend": QUIET} if on else {}
    data = tiny.make_dataset("messages", 8)
    trainer: Any = SFTTrainer(str(folder), args, train_dataset=data, peft_config=lora(r=8), **switch)
    trainer.train()
    return losses_of(trainer), trainer.model


def trainer(folder: Path, work: Path, bits: int, on: bool) -> Outcome:
    """transformers, on rows that are tokenised."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows: Any = [{"input_ids": (ids := tokenizer(text)["input_ids"]), "labels": ids} for text in tiny.sentences(8)]
    args = transformers.TrainingArguments(str(work), **OPTIONS)
    switch: dict[str, Any] = {"backend": QUIET} if on else {}
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    made: Any = transformers.Trainer(adapted(folder, bits), args, train_dataset=rows, data_collator=collator, **switch)
    made.train()
    return losses_of(made), made.model


def loop(folder: Path, work: Path, bits: int, on: bool) -> Outcome:
    """Accelerate, with nothing but ``prepare``."""
    with switched('{"print_report": false}' if on else None):
        accelerator = Accelerator(cpu=not CUDA, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = adapted(folder, bits)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        model, optimizer, batches = accelerator.prepare(model, optimizer, make_batches())
        losses = [loss for _ in range(3) for loss in train_loop(accelerator, model, optimizer, batches)]
        return losses, accelerator.unwrap_model(model)


def axolotl(folder: Path, work: Path, bits: int, on: bool) -> Outcome:
    """A YAML with the switch alone."""
    pytest.importorskip("axolotl")
    from integration_tests.hosts import axolotl_runs

    kind = {"adapter": "qlora", "load_in_4bit": True} if bits == 4 else {}
    switch: dict[str, Any] = {"use_unsloth": True, "sloth": QUIET} if on else {**axolotl_runs.STOCK}
    steps = {"max_steps": STEPS, "num_epochs": 9, "learning_rate": RATE, "lora_r": 8, "lora_alpha": 8}
    given = {"bf16": CUDA, "attn_implementation": "sdpa", **steps, **kind, **switch}
    found = axolotl_runs.train(axolotl_runs.options(work, folder, **given))
    return losses_of(found.trainer), found.model


HOSTS: dict[str, Callable[..., Outcome]] = {"trl": sft, "transformers": trainer, "accelerate": loop, "axolotl": axolotl}


def assert_learns_as(ours: list[float], stock: list[float]) -> None:
    assert ours == pytest.approx(stock, rel=RELATIVE)
    first, last = (sum(losses) / 4 for losses in (stock[:4], stock[-4:]))
    assert last < first - FALL, stock


def test_the_example_of_accelerate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, as ``SLOTH_BACKEND=1`` switches it on."""
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", count=40)
    given = {"model": folder, "data": data, "output_dir": tmp_path, "max_steps": STEPS, "lr": RATE, "batch_size": 4}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    found = []
    for value in (None, "1"):
        reset()
        with pytest.MonkeyPatch.context() as patch, switched(value):
            flags = ["--lora", "--mixed_precision", "bf16", *([] if CUDA else ["--cpu"])]
            patch.setattr(sys, "argv", [str(EXAMPLE), *words, *flags])
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        printed = capsys.readouterr()
        assert ("sloth_backend · accelerate" in printed.err) is (value == "1")
        found.append([float(loss) for loss in re.findall(r"loss (\S+)$", printed.out, re.MULTILINE)])
    assert f"{len(LAYERS)} × model.layers.*" in printed.err
    assert len(found[0]) == STEPS + 1
    assert_learns_as(found[1], found[0])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_with_its_switch_learns_as_without(host: str, bits: int, folder: Path, tmp_path: Path) -> None:
    stock, plain = HOSTS[host](folder, tmp_path, bits, False)
    assert not sloth_backend.report(plain).findings
    reset()
    ours, model = HOSTS[host](folder, tmp_path, bits, True)
    report = sloth_backend.report(model)
    assert [f.subject for f in report.of(action="changed", capability="layer_program")] == LAYERS, str(report)
    assert report.of(action="changed", capability="linear_cross_entropy"), str(report)
    assert report.run.startswith(f"{host}, cuda" if CUDA else host)
    assert_learns_as(ours, stock)
