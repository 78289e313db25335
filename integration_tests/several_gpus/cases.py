"""Short runs of tiny models, spread over the processes of a launcher; ``python -m`` of this module is one process.

Every process runs all cases it is given, one after the other, and the first one writes what came of each.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate.accelerator
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import sloth_backend
from integration_tests import tiny
from integration_tests.several_gpus import zero
from sloth_backend import autoload
from sloth_backend.phases import base_model
from sloth_plugins.program_layers import planner_of

autoload.install()

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODER_LAYER = "LlamaDecoderLayer"
PASS_WITHOUT_MEMORY = 2
LIMIT = 290
"""Seconds that all cases together may take."""


@dataclass
class Case:
    """One run.

    Attributes:
        name: of the files that tell what came of it.
        host: ``loop`` (accelerate), ``sft`` (TRL) or ``trainer`` (transformers).
        strategy: ``none`` (one process), ``ddp``, ``fsdp2`` or ``zero-1`` to ``zero-3``.
        method: ``full``, ``lora`` or ``qlora``.
        backend: whether ours is on.
        accumulation: passes of a process for a step.
        steps: of the optimizer.
        config: options of ours.
        options: of the host.
        fsdp: options of accelerate's plugin.
        save_at: step after which to save; the run goes on.
        resume: folder to go on from.
        counted: whether to count what passes between the processes.
        short_of_memory: process whose device runs out of memory in its second pass; -1 for none.
        lengths: words of each row, over and over; none for sentences of 4 to 12.
        device: ``cpu`` or ``cuda``.
        head_apart: whether the head is an FSDP2 unit that stays gathered, as accelerate 1.15 has it.
        loaded: whether transformers loads the model from a folder, sharded from the start where ZeRO-3 is on by then.
    """

    name: str
    host: str = "loop"
    strategy: str = "ddp"
    method: str = "full"
    backend: bool = True
    accumulation: int = 2
    steps: int = 3
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    save_at: int = 0
    resume: str = ""
    counted: bool = False
    short_of_memory: int = -1
    lengths: list[int] = field(default_factory=list)
    device: str = "cpu"
    head_apart: bool = False
    loaded: bool = False

    @property
    def zero(self) -> int:
        """DeepSpeed's stage; 0 where it is not on."""
        return zero.stage_of(self.strategy)

    @property
    def packed(self) -> torch.dtype:
        """What a model with 4-bit weights is loaded in, and these are packed as: the dtype that FSDP2 computes in."""
        half = self.options.get("bf16") or self.options.get("mixed_precision") == "bf16"
        return torch.bfloat16 if half else torch.float32


def make_model(case: Case, tokenizer: Any) -> Any:
    """The tiny model, the same in every process, with adapters that are not the identity where it has some."""
    # bitsandbytes' kernels for CPUs take no rows shorter than a block.
    sizes = {"hidden_size": 64, "intermediate_size": 128} if case.method == "qlora" else {}
    model = tiny.make_model(tokenizer, tie_word_embeddings=False, **sizes)
    if case.loaded:
        model = zero.loaded(model)
    if case.method == "full":
        return model
    if case.method == "qlora":
        model = quantized(model.to(dtype=case.packed), case.device, case.packed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    base: Any = model
    model = get_peft_model(base, config)
    if case.method == "qlora" and case.host == "sft" and case.packed == torch.float32:
        # TRL would round the adapters to bf16, and what is compared is float32.
        base.is_loaded_in_4bit = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data * 0.1
    return model


def quantized(model: Any, device: str = "cpu", packed: torch.dtype = torch.float32) -> Any:
    """Its linears in NF4, packed as a dtype that FSDP does not cast."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    new = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=packed,
                        quant_type="nf4",
                        quant_storage=packed,
                    )
                    new.weight.data = linear.weight.data
                    setattr(parent, name, new.to(device))
    model.is_loaded_in_4bit = True
    return model.to(device)  # a checkpoint would be loaded there as a whole


def make_accelerator(case: Case) -> Accelerator:
    """One as in a process that has had none, of the case's strategy."""
    _reset(case)
    plugin = None
    if case.strategy == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            **{
                "fsdp_version": 2,
                "auto_wrap_policy": "transformer_based_wrap",
                "transformer_cls_names_to_wrap": [DECODER_LAYER],
                "reshard_after_forward": True,
                "cpu_ram_efficient_loading": False,
                **case.fsdp,
            }
        )
    if case.zero:
        return Accelerator(deepspeed_plugin=zero.plugin(case.zero, case.accumulation), **case.options)
    on_cpu = case.device == "cpu"
    return Accelerator(cpu=on_cpu, gradient_accumulation_steps=case.accumulation, fsdp_plugin=plugin, **case.options)


def _reset(case: Case) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    unset_hf_deepspeed_config()
    if case.zero:
        zero.prepare(case.device)
        return
    PartialState(cpu=case.device == "cpu")
    if case.strategy == "fsdp2" and case.device == "cpu":
        _shard_on_cpus(torch.device("cpu"))


def _load_to_cpus() -> None:
    """Transformers loads the states of several processes to ``cpu:0``, a place that PyTorch does not know by name."""
    known = lambda storage, location: storage if location.startswith("cpu:") else None
    torch.serialization.register_package(100, lambda storage: None, known)


def _shard_on_cpus(device: torch.device) -> None:
    """Accelerate shards on accelerators alone; PyTorch does so on CPUs as well."""
    assert device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def batches_of(tokenizer: Any, count: int) -> Any:
    """A loader of padded batches of two rows."""

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    return torch.utils.data.DataLoader(tiny.sentences(2 * count, seed=3), 2, collate_fn=collate)  # pyright: ignore


def loop(case: Case, folder: Path) -> dict[str, Any]:
    """A loop as users of accelerate write it, each batch its own mean."""
    set_seed(0)
    accelerator, tokenizer = make_accelerator(case), tiny.make_tokenizer()
    if case.backend:
        sloth_backend.attach(accelerator, config={"print_report": False, **case.config})
    model = make_model(case, tokenizer)
    # Adam would make steps of one size of gradients that are next to nothing and differ by roundings.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    count = case.steps * case.accumulation * accelerator.num_processes
    whole = {name: StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters()}
    assert not any(storage.expired() for storage in whole.values())
    with sharding_the_head_apart(case.head_apart):
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches_of(tokenizer, count))
    gc.collect()
    held = [name for name, storage in whole.items() if not storage.expired()]
    if case.resume:
        accelerator.load_state(case.resume)
    if case.short_of_memory >= 0:
        run_out_of_memory(case, model)
    losses, step, logits = [], 0, ""
    model.train()
    for batch in batches:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            loss, logits = outputs.loss, type(outputs.logits).__name__
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        step += accelerator.sync_gradients
        if case.save_at and accelerator.sync_gradients and step == case.save_at:
            accelerator.save_state(str(folder / case.name))
    evaluation = evaluated(accelerator, model, tokenizer)
    return {"losses": losses, "model": model, "evaluation": evaluation, "logits": logits, "held": held}


@contextmanager
def sharding_the_head_apart(wanted: bool) -> Iterator[None]:
    """Have accelerate find the head sharded already when it shards the model."""
    original = accelerate.accelerator.fsdp2_prepare_model

    def prepare(accelerator: Any, model: Any) -> Any:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
        fully_shard(model.get_output_embeddings(), reshard_after_forward=False, mp_policy=policy)
        return original(accelerator, model)

    accelerate.accelerator.fsdp2_prepare_model = prepare if wanted else original
    try:
        yield
    finally:
        accelerate.accelerator.fsdp2_prepare_model = original


def evaluated(accelerator: Any, model: Any, tokenizer: Any) -> list[float]:
    """The loss and the size of the logits, which a host looks at after the model's forward."""
    model.eval()
    batch = {name: value.to(accelerator.device) for name, value in next(iter(batches_of(tokenizer, 1))).items()}
    with torch.no_grad():
        outputs = model(**batch)
    return [outputs.loss.item(), outputs.logits.float().square().mean().item()]


def trained(case: Case, folder: Path) -> dict[str, Any]:
    """TRL's or transformers' trainer."""
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    _reset(case)
    set_seed(0)
    tokenizer = tiny.make_tokenizer()
    options: dict[str, Any] = {
        "use_cpu": case.device == "cpu",
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.1,
        "optim": "sgd",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_checkpointing": False,
        "max_steps": case.steps,
        **case.options,
    }
    if case.strategy == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [DECODER_LAYER]}}
        options["fsdp_config"] |= case.fsdp
    if case.zero:
        options |= {"use_cpu": False, "deepspeed": zero.trainer_options(case.zero)}
    if case.save_at:
        options |= {"save_strategy": "steps", "save_steps": case.save_at}
    rows = 2 * case.steps * case.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    data = tiny.make_dataset("text", rows)
    if case.lengths:
        texts = [" ".join(tiny.WORDS[i % 13 :: 3] * case.lengths[i % len(case.lengths)]) for i in range(rows)]
        data = type(data).from_list([{"text": text} for text in texts])
    kind, config = (SFTTrainer, SFTConfig) if case.host == "sft" else (Trainer, TrainingArguments)
    if case.host == "trainer":
        encoded = [tokenizer(row["text"])["input_ids"] for row in data]
        data = type(data).from_list([{"input_ids": ids, "labels": ids} for ids in encoded])
        from transformers import DataCollatorForSeq2Seq

        extra: dict[str, Any] = {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    else:
        extra = {"processing_class": tokenizer}
    if case.backend:
        extra["backend"] = {"print_report": False, **case.config}
    args = config(str(folder / case.name), **options)
    if case.strategy == "fsdp2" and case.device == "cpu":
        _shard_on_cpus(args.device)
    trainer: Any = kind(model=make_model(case, tokenizer), args=args, train_dataset=data, **extra)
    if case.short_of_memory >= 0:
        run_out_of_memory(case, trainer.model)
    trainer.train(resume_from_checkpoint=case.resume or None)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "model": trainer.model_wrapped}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """All trained parameters, whole; every process has to ask."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor().detach() if hasattr(parameter, "full_tensor") else zero.whole(parameter)
            found[name.removeprefix("module.")] = whole.cpu()
    return found


@contextmanager
def counting(wanted: bool) -> Iterator[dict[str, int]]:
    """How often each collective was called meanwhile, where that is wanted."""
    events: dict[str, int] = {}
    if not wanted:
        yield events
        return
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield events
    events |= {event.key: event.count for event in seen.key_averages() if event.key.startswith("c10d::")}


def run_out_of_memory(case: Case, model: Any) -> None:
    """Let the last stage of the last layer's program run out of memory in its second pass, in one process."""
    if case.short_of_memory != int(os.environ.get("RANK", "0")):
        return
    planner = planner_of(base_model(model))
    stage = planner.layers[-1].made.program.stages[-1]
    bind, passes = stage.bind, []

    def scarce(autocast: Any) -> Any:
        bound = bind(autocast)
        forward = bound.forward
        passes.append(bound)

        def run(*inputs: Any) -> Any:
            if len(passes) == PASS_WITHOUT_MEMORY:
                passes.append(None)
                raise torch.OutOfMemoryError("no memory left, the test says")
            return forward(*inputs)

        bound.forward = run
        return bound

    stage.bind = scarce


def run(case: Case, folder: Path) -> dict[str, Any]:
    """One case, with what passed between the processes meanwhile."""
    with counting(case.counted) as events:
        outcome = (loop if case.host == "loop" else trained)(case, folder)
    model = outcome.pop("model")
    report = sloth_backend.report(model).to_dict() if case.backend else {}
    return {**outcome, "collectives": events, "report": report, "weights": weights_of(model)}


def main() -> None:
    """Run the cases of the folder given as the one argument; a process that waits for ever says where, and ends."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    _load_to_cpus()
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    for number, options in enumerate(json.loads((folder / "cases.json").read_text())):
        case = Case(**options)
        outcome = run(case, folder)
        torch.save(outcome, folder / f"{case.name}.{rank}.pt")
        del outcome, number
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def described(cases: list[Case]) -> str:
    """The cases as ``main`` reads them."""
    return json.dumps([asdict(case) for case in cases])


if __name__ == "__main__":
    main()
