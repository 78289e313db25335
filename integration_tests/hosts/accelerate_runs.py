"""Loops as users of Accelerate write them, on tiny models; none of them knows of the backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from integration_tests import tiny
from integration_tests.child import ROOT
from sloth_backend.hosts.environment import VARIABLE, patch_accelerator

EXAMPLE = ROOT / "docs" / "examples" / "accelerate_causal_lm.py"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = tiny.LAYERS


@contextmanager
def switched(value: str | None) -> Iterator[None]:
    """The environment variable as given and Accelerate as a process has it that started so; as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        if value is not None:
            patch.setenv(VARIABLE, value)
        patch.setattr(Accelerator, "prepare", Accelerator.prepare)
        patch_accelerator(accelerate.accelerator)
        yield


def make_accelerator(mixed_precision: str = "no", cpu: bool = True, **options: Any) -> Accelerator:
    """One in a process that has had none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, **options)


def make_model(lora: bool = False, seed: int = 0) -> Any:
    """A tiny model, with adapters that are not zero where asked."""
    model = tiny.make_model(tiny.make_tokenizer(), seed)
    if not lora:
        return model
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def make_batches(workers: int = 0, tokenizer: Any = None) -> DataLoader:
    """Eight padded batches of two rows; ``collate`` tokenises, in workers where there are some."""
    tokenizer = tokenizer or tiny.make_tokenizer()

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    return DataLoader(tiny.sentences(16, seed=3), 2, collate_fn=collate, num_workers=workers, **options)  # pyright: ignore


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any) -> list[float]:
    """One epoch over prepared objects; the loss of every batch."""
    losses = []
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def evaluate(accelerator: Accelerator, model: Any, batches: Any) -> list[float]:
    """The loss and the root mean square of the logits of every batch."""
    model.eval()
    found = []
    for batch in batches:
        with torch.no_grad():
            outputs = model(**batch)
        logits = accelerator.gather_for_metrics(outputs.logits)
        found += [outputs.loss.item(), logits.float().square().mean().sqrt().item()]  # pyright: ignore
    model.train()
    return found
