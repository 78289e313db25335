"""One process of torchrun: build, adapt, shard and train, in a loop of accelerate's; the first one writes what came.

The loop is the one its users write; the two kinds of contender differ in ``sloth_backend.attach`` alone. FSDP2
checkpoints layers (``activation_checkpointing``), computes in bf16 and reduces gradients in float32; the loss is not
cast, so that it can be compared. Every step is on the same rows, each process and each pass on its own.

The truth, stock in float32, says how far from it rounding takes stock's losses: the same model, its products in TF32
(``training/loading.py``), which rounds an eighth as much as bf16; in float32 proper a step would take minutes.

usage: torchrun --nproc_per_node 2 -m integration_tests.benchmarks.seventy.train CONTENDER --out FILE [--tiny] ...
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import statistics
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from peft import get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy

from integration_tests.benchmarks.seventy.model import DECODER_LAYER, DTYPE, build, checksum, parameters, shape
from integration_tests.benchmarks.training import loading
from integration_tests.benchmarks.training.clock import GIB, allocated_gib, device_name, peaks, reset_peak, versions
from integration_tests.benchmarks.training.clock import wait as idle
from integration_tests.benchmarks.training.contenders import CONTENDERS, Contender
from integration_tests.benchmarks.training.rows import start_adapters, zipf_ids

LEARNING_RATE = 2e-4


class Progress:
    """What is being done, with the time, and what memory it took; one line each from the first process."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.first = os.environ.get("RANK", "0") == "0"
        self.phases: dict[str, dict[str, float]] = {}

    def say(self, text: str) -> None:
        """Print it."""
        if self.first:
            print(f"[{time.perf_counter() - self.start:6.1f} s] {text}", flush=True)

    def done(self, phase: str) -> None:
        """A phase has ended: remember its seconds and peak, and start measuring the next."""
        idle()
        now = time.perf_counter()
        self.phases[phase] = {"seconds": round(now - self.last, 2), "now_gib": round(allocated_gib(), 3), **peaks()}
        self.last = now
        self.say(f"{phase}: {self.phases[phase]}")
        reset_peak()


def make_accelerator(accumulation: int, timeout: float, dtype: torch.dtype) -> Accelerator:
    """FSDP2 over all processes, by layer, computing in ``dtype``."""
    on_cpu = not torch.cuda.is_available()
    limits = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    if on_cpu:
        # Accelerate shards on accelerators alone; PyTorch does so on CPUs as well.
        PartialState(cpu=True, timeout=limits.timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[DECODER_LAYER],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=True,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    )
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if dtype is DTYPE else "no",
        gradient_accumulation_steps=accumulation,
        fsdp_plugin=plugin,
        kwargs_handlers=[limits],
    )


def adapted_model(
    options: argparse.Namespace, contender: Contender, accelerator: Accelerator, progress: Progress
) -> Any:
    """The model with its adapters, whole in every process.

    Raises:
        RuntimeError: the processes built different models.
    """
    of, attention = shape(options.tiny, options.layers), loading.frugal_attention() if contender.truth else "sdpa"
    base = build(of, accelerator.device, dtype=computed_in(contender), attention=attention)
    if contender.truth:
        loading.multiply_in_tf32(base)
    progress.done("build")
    sums = gather_object([checksum(base)])
    if len(set(sums)) != 1:
        raise RuntimeError(f"the processes built different models, of checksums {sums}")
    progress.say(f"{parameters(base) / 1e9:.2f}B parameters, the same in {len(sums)} processes")
    with torch.device(accelerator.device):  # PEFT draws 400 million values, which would take a CPU a while
        model = get_peft_model(base, loading.lora_config(options.rank))
    start_adapters(model)
    progress.done("adapt")
    return model.train()


def computed_in(contender: Contender) -> torch.dtype:
    """float32 for the truth."""
    return torch.float32 if contender.truth else DTYPE


def token_ids(options: argparse.Namespace, process: int, at: int, vocab: int) -> torch.Tensor:
    """The rows of a process's pass (rows, length)."""
    source = torch.Generator().manual_seed(1_000 * process + at)
    return zipf_ids(source, (options.rows, options.length), vocab)


def train(options: argparse.Namespace, accelerator: Accelerator, model: Any, progress: Progress) -> dict[str, Any]:
    """The steps: seconds and losses, a step's being the mean of its passes in all processes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Of sharded parameters PyTorch would update one after the other if it were not told.
    optimizer: Any = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    del trained
    model, optimizer = accelerator.prepare(model, optimizer)
    release()
    progress.done("prepare")
    vocab = model.config.vocab_size
    passes = [token_ids(options, accelerator.process_index, at, vocab) for at in range(options.accumulation)]
    passes = [ids.to(accelerator.device) for ids in passes]
    seconds: list[float] = []
    losses: list[float] = []
    for at in range(options.steps):
        idle()
        start = time.perf_counter()
        loss = torch.stack([one_pass(accelerator, model, optimizer, ids) for ids in passes]).mean()
        mean: Any = accelerator.reduce(loss.float(), "mean")
        losses.append(mean.item())
        idle()
        seconds.append(time.perf_counter() - start)
        progress.say(f"step {at}: {seconds[-1]:.3f} s, loss {losses[-1]:.5f}, {peaks()}")
    progress.done("train")
    refuse_untrained(model, losses)
    return {"all_seconds": seconds, "losses": losses}


def release() -> None:
    """Hand back to the device what whole weights took before they were sharded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_pass(accelerator: Accelerator, model: Any, optimizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Forward and backward of one micro-batch; the last one of a step ends with the step."""
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def refuse_untrained(model: Any, losses: list[float]) -> None:
    """Raises RuntimeError where an adapter is as it was, or a loss is no number."""
    if not all(loss == loss and abs(loss) != float("inf") for loss in losses):
        raise RuntimeError(f"a loss is no number: {losses}")
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not parameter.to_local().any():
            raise RuntimeError(f"{name} has not been trained")


def figures(options: argparse.Namespace, came: dict[str, Any]) -> dict[str, Any]:
    """Of the steps that count."""
    median = statistics.median(came["all_seconds"][options.warmup :])
    tokens = options.rows * options.length * options.accumulation * dist.get_world_size()
    return {
        "step_seconds": round(median, 4),
        "tokens_per_second": round(tokens / median, 1),
        "all_seconds": [round(value, 4) for value in came["all_seconds"]],
        "losses": [round(value, 6) for value in came["losses"]],
    }


def said(contender: Contender, model: Any) -> dict[str, Any]:
    """What the report says of ours: findings, how many layers are programs, and the plan."""
    if not contender.ours:
        return {}
    from sloth_backend import report

    found = report(model)
    return {
        **loading.findings(contender, model),
        "layers_changed": len(found.of(action="changed", capability="layer_program")),
        "plan": [finding.reason for finding in found.of(capability="memory_plan")],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, and what came of it in all processes."""
    contender, progress = CONTENDERS[options.contender], Progress()
    accelerator = make_accelerator(options.accumulation, options.timeout, computed_in(contender))
    progress.say(f"{contender.title}: {accelerator.num_processes} processes, {device_name()}")
    if contender.ours:
        import sloth_backend

        budget = {"vram_budget_gb": options.budget} if options.budget else {}
        sloth_backend.attach(accelerator, config={"print_report": False, **contender.options, **budget})
    reset_peak()
    model = adapted_model(options, contender, accelerator, progress)
    came = train(options, accelerator, model, progress)
    progress.say(json.dumps(said(contender, model), indent=1))
    host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
    of = shape(options.tiny, options.layers)
    return {
        "contender": options.contender,
        "device": device_name(),
        "processes": accelerator.num_processes,
        "versions": versions(contender.kind),
        "shape": {name: value for name, value in asdict(of).items() if name != "others"},
        **{name: getattr(options, name) for name in ("rows", "length", "accumulation", "rank", "steps", "warmup")},
        **figures(options, came),
        **said(contender, model),
        "ranks": gather_object([{**progress.phases, "host_peak_gib": host}]),
    }


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that the measurement as a whole has too."""
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a CPU")
    parser.add_argument("--layers", type=int, help="instead of the model's 80")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--rows", type=int, default=2, help="of a pass of a process")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    parser.add_argument("--accumulation", type=int, default=4, help="passes a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="steps that do not count")
    parser.add_argument("--budget", type=float, default=0.0, help="ours: vram_budget_gb; 0 for what the device has")
    parser.add_argument("--timeout", type=float, default=90, help="seconds that a collective may take")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a contender may take")


def main() -> None:
    """Run; where it takes too long, say where every thread is and end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    add_sizes(parser)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.limit, exit=True)
    result = run(options)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
