"""Fine-tune a causal language model in a loop of one's own, as Accelerate's documentation writes it.

    accelerate launch docs/examples/accelerate_causal_lm.py --model NAME_OR_FOLDER --data rows.jsonl --output_dir out

``rows.jsonl`` has one JSON object a line with the field ``text``. ``--lora`` trains adapters, else all weights are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup


def get_dataloaders(
    accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[DataLoader, DataLoader]:
    """Tokenise the rows and make loaders of padded batches; the last tenth of the rows is for evaluation."""
    rows = load_dataset("json", data_files=str(args.data), split="train", cache_dir=str(args.output_dir / "cache"))

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"], truncation=True, max_length=args.max_length)

    with accelerator.main_process_first():
        tokenized = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    parts = tokenized.train_test_split(test_size=0.1, shuffle=False)

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tokenizer.pad(examples, padding="longest", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    train = DataLoader(parts["train"], shuffle=True, collate_fn=collate, batch_size=args.batch_size)  # pyright: ignore
    evaluation = DataLoader(parts["test"], collate_fn=collate, batch_size=args.batch_size)  # pyright: ignore
    return train, evaluation


def evaluate(accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader) -> float:
    """The mean of the batches' losses."""
    model.eval()
    losses = []
    for batch in dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        losses.append(accelerator.gather_for_metrics(outputs.loss.reshape(1)))
    model.train()
    return torch.cat(losses).mean().item()


def training_function(args: argparse.Namespace) -> None:
    """Load, prepare, train, evaluate and save."""
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # Rows come in the same order to any number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_dataloader, eval_dataloader = get_dataloaders(accelerator, tokenizer, args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.max_steps)

    model, optimizer, train_dataloader, eval_dataloader, scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, scheduler
    )
    step = 0
    model.train()
    total = torch.zeros((), device=accelerator.device)
    while step < args.max_steps:
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            total += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                step += 1
                accelerator.print(f"step {step}: loss {accelerator.reduce(total, reduction='mean').item():.7f}")
                total.zero_()
                if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                    accelerator.save_state(str(args.output_dir / f"step_{step}"))
            if step == args.max_steps:
                break
    accelerator.print(f"evaluation: loss {evaluate(accelerator, model, eval_dataloader):.7f}")
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    accelerator.end_training()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with Accelerate.")
    parser.add_argument("--model", required=True, help="Name on the hub, or folder.")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with the field text.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8, help="Rows of each process in a pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--checkpointing_steps", type=int, default=0, help="Save the state every so many steps.")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--cpu", action="store_true", help="Train on the CPU.")
    training_function(parser.parse_args())


if __name__ == "__main__":
    main()
