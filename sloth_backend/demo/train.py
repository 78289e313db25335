"""One run through ``trl.SFTTrainer``: data, model, training, evaluation, a sample answer."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

import sloth_backend
from sloth_backend.config import SlothConfigError
from sloth_backend.demo import data as conversations
from sloth_backend.demo import models, show
from sloth_backend.demo.data import Conversation, Data, DemoError
from sloth_backend.demo.outcome import Curve, Outcome, Sample, Settings
from sloth_backend.demo.recorder import Recorder
from sloth_backend.table import table

EVALUATIONS = 6
ANSWER_TOKENS = 80
VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Recipe:
    """The numbers of one kind of run; ``max_length`` in tokens, ``packing`` fills every row to that length."""

    steps: int
    learning_rate: float
    batch_size: int
    max_length: int
    accumulation: int = 1
    packing: bool = False


SCRATCH = Recipe(steps=480, learning_rate=4e-3, batch_size=4, max_length=128, packing=True)
LORA = Recipe(steps=60, learning_rate=2e-4, batch_size=2, max_length=1024, accumulation=4)
FULL = Recipe(steps=60, learning_rate=2e-5, batch_size=2, max_length=1024, accumulation=4)
"""The demo's own model from random weights; adapters on a given model; all weights of a given model."""


def run(settings: Settings, console: Console, save_to: Path | None = None) -> Outcome:
    """Train as ``settings`` say; the trained model and its tokenizer are saved to ``save_to`` if given.

    Raises:
        DemoError: bad data, a model that cannot be loaded, or a combination that the backend refuses.
    """
    with _quiet():
        data = conversations.load(settings.data)
        transformers.set_seed(settings.seed)
        model, tokenizer = _model(settings, data)
        recorder = Recorder(console)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(settings, model, tokenizer, data, recorder, folder)
            trained: Any = trainer.model
            show.facts({"data": data.describe(), "model": models.describe(trained)}, console)
            if settings.backend:
                console.print(table(sloth_backend.report(trained)))
            train, held_out = _train(trainer, recorder)
        sample = _sample(trained, tokenizer, data)
        if save_to is not None:
            trained.save_pretrained(save_to)
            tokenizer.save_pretrained(save_to)
    return Outcome(
        settings=settings,
        device=_device(),
        model=models.describe(trained),
        data=data.describe(),
        train=train,
        held_out=held_out,
        seconds=recorder.seconds,
        peak_bytes=_peak_bytes(),
        report=sloth_backend.report(trained),
        sample=sample,
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS},
    )


def _model(settings: Settings, data: Data) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if settings.model is None:
        tokenizer = models.train_tokenizer(conversations.texts(data.train))
        return models.build_model(tokenizer, settings.seed), tokenizer
    frozen_in_bf16 = settings.trains_adapters and _has_bf16()
    return models.load_model(settings.model, torch.bfloat16 if frozen_in_bf16 else torch.float32)


def _trainer(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    recorder: Recorder,
    folder: str,
) -> SFTTrainer:
    recipe = SCRATCH if settings.model is None else LORA if settings.trains_adapters else FULL
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if settings.trains_adapters else None
    switch: dict[str, Any] = {"backend": {"print_report": False}} if settings.backend else {}
    try:
        trainer = SFTTrainer(
            model,
            _arguments(settings, recipe, folder),
            train_dataset=Dataset.from_list([{"messages": item} for item in data.train]),
            eval_dataset=Dataset.from_list([{"messages": item} for item in data.held_out]),
            processing_class=tokenizer,
            callbacks=[recorder],
            peft_config=adapters,
            **switch,
        )
    except SlothConfigError as error:
        raise DemoError(str(error)) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: Settings, recipe: Recipe, folder: str) -> SFTConfig:
    steps = settings.steps or recipe.steps
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        seed=settings.seed,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_length=recipe.max_length,
        packing=recipe.packing,
        packing_strategy="wrapped",
        eval_packing=False,
        gradient_checkpointing=settings.model is not None,
        bf16=_has_bf16(),
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATIONS),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # one GPU is enough, and with several visible the Trainer would wrap the model in nn.DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _train(trainer: SFTTrainer, recorder: Recorder) -> tuple[Curve, Curve]:
    """Evaluate, train with evaluations in between, evaluate; the training and the held-out curve."""
    before = trainer.evaluate()["eval_loss"]
    try:
        trainer.train()
    finally:
        recorder.close()
    last, history = trainer.state.global_step, trainer.state.log_history
    train, held_out = (
        [(int(entry["step"]), entry[name]) for entry in history if name in entry] for name in ("loss", "eval_loss")
    )
    if held_out[-1][0] != last:
        held_out.append((last, trainer.evaluate()["eval_loss"]))
    return train, [(0, before), *held_out]


def _sample(model: Any, tokenizer: PreTrainedTokenizerBase, data: Data) -> Sample:
    """The answer to the held-out conversation with the shortest prompt.

    Decoding is greedy with a repetition penalty of 1.2 (Keskar et al., 2019, section 4.1).
    """
    prompt, expected = min((_last_turn(item) for item in data.held_out), key=lambda turn: len(str(turn)))
    inputs: Any = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = inputs.to(model.device)
    model.eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, repetition_penalty=1.2)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Sample(prompt[-1]["content"], expected, str(answer).strip())


def _last_turn(conversation: Conversation) -> tuple[Conversation, str]:
    """A conversation up to the assistant's last message, and that message."""
    last = max(n for n, message in enumerate(conversation) if message["role"] == "assistant")
    return conversation[:last], conversation[last]["content"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the demo's own output: the libraries' progress bars and warnings are off meanwhile."""
    level, bars = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        if bars:
            datasets.enable_progress_bars()


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {'bfloat16' if _has_bf16() else 'float32'}"
    return f"CPU, {torch.get_num_threads()} threads, float32"


def _peak_bytes() -> int:
    """Peak allocated memory of the GPU, or peak resident memory of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
