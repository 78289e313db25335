"""CUDA graphs of short passes: gradients, run after run, to the bit those of passes that launch every kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_backend
from integration_tests.plugins.layer_programs.common import quantised
from sloth_kernels.documents import remember
from sloth_kernels.recording import CudaCapture
from sloth_plugins.program_layers import planner_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
SIZES = ((100, 90, 60), (120, 70, 66), (200, 100, 50), (128, 100, 28), (90, 80, 86))
PASSES = 10


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=4, **sizes))
    model = model.to("cuda", torch.bfloat16)
    if kind == "nf4":
        model = quantised(model, compute_dtype=torch.bfloat16).to("cuda")
    if kind != "full":
        config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config)
    return model.train()


def documents(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(hash(lengths) % 1000)
    ids = torch.randint(3, 900, (1, sum(lengths)), generator=source).cuda()
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    remember(positions, lengths)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def run(model: Any, transient: bool) -> list[torch.Tensor]:
    """Losses, and gradients of two passes a step, with a step of the optimizer between."""
    planner = planner_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    planner.transient, found = transient, []
    for step in range(PASSES):
        for lengths in (SIZES[step % len(SIZES)], SIZES[(step + 1) % len(SIZES)]):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**documents(lengths)).loss
            loss.backward()
            found.append(loss.detach().clone())
        found += [p.grad.clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
    planner.transient = False
    return found


@pytest.mark.parametrize("kind", ["nf4", "lora", "full"])
def test_numbers_are_those_of_passes_that_launch_every_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind)
    runs = []
    for transient in (False, True):
        mine = copy.deepcopy(model)
        mine = sloth_backend.optimize(mine, config={"print_report": False})
        planner = planner_of(mine.get_base_model() if hasattr(mine, "get_base_model") else mine)
        monkeypatch.setattr(planner, "waits_for_host", lambda shape: True)
        runs.append(run(mine, transient))
        said = [f.action for f in sloth_backend.report(mine).findings if f.subject == "short passes"]
        assert said == (["changed"] if transient else [])
    assert len(runs[0]) == len(runs[1])
    for launched, played in zip(*runs, strict=True):
        assert torch.equal(launched, played) or (launched - played).abs().max() <= 2e-2 * launched.abs().max()


def test_recordings_of_other_passes_use_the_memory_that_is_lent() -> None:
    x = torch.randn(1 << 20, device="cuda")
    capture = CudaCapture(x.device)
    first, play_first = capture.record(lambda: {"y": x + 1})
    play_first()
    assert torch.equal(first["y"], x + 1)
    address, unowned = first["y"].data_ptr(), capture.unowned(first["y"])
    del first
    second, play_second = capture.record(lambda: {"y": x * 2})
    assert second["y"].data_ptr() == address == unowned.data_ptr()
    play_second()
    assert torch.equal(unowned, x * 2)
    play_first()
    assert torch.equal(unowned, x + 1)
