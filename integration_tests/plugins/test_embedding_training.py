"""Embeddings that train: stock's numbers, saved, merged and loaded as trained, and a learning rate of their own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import AutoModelForCausalLM, get_scheduler

import sloth_backend
from integration_tests import tiny
from integration_tests.hosts.accelerate_runs import make_accelerator
from integration_tests.hosts.trl_runs import LINEARS, lora, make_args, make_trainer
from sloth_backend import SlothConfigError, autoload
from sloth_backend.embedding_rate import embedding_parameters, split_groups
from sloth_backend.phases import base_model

autoload.install()

QUIET: Any = {"print_report": False, "fix_embeddings": False}
TOKENIZER = tiny.make_tokenizer()
BOTH = ("embed_tokens", "lm_head")
ROWS = [3, 4, 30]
TRAINED: dict[str, Any] = {
    "all": None,
    "both": {"modules_to_save": list(BOTH)},
    "both, tied": {"modules_to_save": list(BOTH), "ensure_weight_tying": True},
    "input": {"modules_to_save": ["embed_tokens"]},
    "output": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": ROWS},
    "rows of both": {"trainable_token_indices": dict.fromkeys(BOTH, ROWS)},
    "other rows": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS[1:]}},
    "adapters": {"target_modules": [*LINEARS, "embed_tokens"]},
}
"""What trains, as options of LoRA."""
HAZARDS = [("other rows", True), ("adapters", True)]
"""What PEFT merges into something else than what was trained."""
FUSED = "linear_cross_entropy"


def make(trained: str, tied: bool) -> Any:
    model = tiny.make_model(TOKENIZER, tie_word_embeddings=tied)
    options = copy.deepcopy(TRAINED[trained])  # PEFT changes lists that it is given
    torch.manual_seed(1)
    return model if options is None else get_peft_model(model, lora(init_lora_weights=False, **options))


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Three rows, one padded, that use the trained rows; the first tokens have no label."""
    ids = torch.randint(0, len(TOKENIZER), (3, 20), generator=torch.Generator().manual_seed(seed))
    ids[:, 6:9] = torch.tensor(ROWS)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :5], labels[1, 15:], mask[1, 15:] = -100, -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def steps(model: Any, dtype: torch.dtype = torch.float32) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Loss and gradients of each of three steps of plain gradient descent."""
    model.to(dtype).train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses, grads = torch.optim.SGD(named.values(), lr=0.1), [], []
    for seed in range(3):
        loss = model(**batch(seed)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad.double() for name, p in named.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch(9)["input_ids"]).logits.clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_numbers_are_those_of_stock_and_survive_saving_and_merging(trained: str, tied: bool, tmp_path: Path) -> None:
    stock, truth = steps(make(trained, tied)), steps(make(trained, tied), torch.float64)
    model = sloth_backend.optimize(make(trained, tied), config=QUIET)
    ours = steps(model)
    report = sloth_backend.report(model)
    assert report.of(action="changed", capability=FUSED), str(report)
    for mine, theirs, true in zip(ours[0], stock[0], truth[0], strict=True):
        assert abs(mine - true) <= abs(theirs - true) + 2e-6 * abs(true)
    for step, (mine, theirs, true) in enumerate(zip(ours[1], stock[1], truth[1], strict=True)):
        assert mine.keys() == theirs.keys() == true.keys()
        for name, exact in true.items():
            # Each step makes more of the roundings before it, in stock as well.
            allowed = (theirs[name] - exact).abs().max() + 1e-5 * 4**step * exact.abs().max()
            assert (mine[name] - exact).abs().max() <= allowed, name
    survives(model, trained, tied, tmp_path)


def survives(model: Any, trained: str, tied: bool, folder: Path) -> None:
    """The trained model, its adapter on a fresh base, and the merged model, saved and loaded, have the same logits."""
    expected = logits(model)

    def same(other: Any) -> bool:
        return torch.allclose(logits(other), expected, rtol=1e-5, atol=1e-5)

    model.save_pretrained(folder / "saved")
    if TRAINED[trained] is None:
        assert same(AutoModelForCausalLM.from_pretrained(folder / "saved"))
        return
    base = tiny.make_model(TOKENIZER, tie_word_embeddings=tied)
    assert same(PeftModel.from_pretrained(base, str(folder / "saved")))
    warned = sloth_backend.report(model).of(action="warned", capability="embedding_training")
    merged = model.merge_and_unload()
    assert same(merged) is not ((trained, tied) in HAZARDS)
    assert bool(warned) is ((trained, tied) in HAZARDS)
    merged.save_pretrained(folder / "merged")
    assert same(AutoModelForCausalLM.from_pretrained(folder / "merged")) is not bool(warned)


def test_rows_of_an_adapter_that_is_switched_off_are_the_base_models() -> None:
    model, stock = make("rows", True), make("rows", True)
    sloth_backend.optimize(model, config=QUIET)
    steps(model)
    steps(stock)
    with model.disable_adapter(), stock.disable_adapter():
        assert model(**batch(0)).loss.item() == pytest.approx(stock(**batch(0)).loss.item(), rel=1e-6)
    model.merge_adapter()
    stock.merge_adapter()
    assert model(**batch(0)).loss.item() == pytest.approx(stock(**batch(0)).loss.item(), rel=1e-5)
    sloth_backend.undo(model)
    assert "forward" not in vars(model.get_base_model().lm_head.token_adapter)


EMBEDDINGS = {
    "all": 2, "both": 2, "both, tied": 2, "input": 1, "output": 1, "rows": 1, "rows of both": 2, "other rows": 2,
    "adapters": 0,
}  # fmt: skip


@pytest.mark.parametrize("trained", TRAINED)
def test_embeddings_are_what_trains_of_them(trained: str) -> None:
    model = make(trained, False)
    model = model if trained == "all" else model.get_base_model()
    assert len(embedding_parameters(model)) == EMBEDDINGS[trained]
    assert all(p.requires_grad for p in embedding_parameters(model))
    if trained == "all":
        assert len(embedding_parameters(make("all", True))) == 1


RATE, OTHERS = 5e-4, 2e-3


def rates(trainer: Any) -> tuple[set[float], set[float]]:
    """Learning rates of what trains of the embeddings, and of all else."""
    own = {id(p) for p in embedding_parameters(base_model(trainer.model))}
    groups = trainer.optimizer.param_groups
    found = [(id(p) in own, group["lr"]) for group in groups for p in group["params"]]
    assert len(found) == sum(p.requires_grad for p in trainer.model.parameters())
    return {rate for mine, rate in found if mine}, {rate for mine, rate in found if not mine}


@pytest.mark.parametrize("given", [False, True])
def test_trl_trains_them_at_their_rate(given: bool, tmp_path: Path) -> None:
    switch = {**QUIET, "embedding_learning_rate": RATE}
    args = make_args(tmp_path, lr_scheduler_type="linear", max_steps=2, weight_decay=0.1)
    options: dict[str, Any] = {"peft_config": lora(modules_to_save=list(BOTH))}
    if given:
        model = make("both", False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=OTHERS, weight_decay=0.1)
        options = {"model": model, "optimizers": (optimizer, get_scheduler("linear", optimizer, 0, 2))}
    trainer = make_trainer(tmp_path, args=args, backend=switch, **options)
    found = sloth_backend.report(trainer.model).of(capability="embedding_training")
    assert [(finding.action, finding.subject) for finding in found] == [("changed", "optimizer")]
    if not given:
        trainer.create_optimizer()
        trainer.create_optimizer()  # twice is harmless
    assert rates(trainer) == ({RATE}, {OTHERS})
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]} >= {0.1}
    trainer.train()
    mine, others = rates(trainer)
    assert mine == others == {0.0}  # the end of the schedule


def test_the_rate_is_what_moves_them(tmp_path: Path) -> None:
    def moved(rate: float | None) -> float:
        args = make_args(tmp_path, optim="sgd", max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant")
        switch = {**QUIET, "embedding_learning_rate": rate}
        trainer = make_trainer(tmp_path, args=args, peft_config=lora(modules_to_save=list(BOTH)), backend=switch)
        before = [p.detach().clone() for p in embedding_parameters(base_model(trainer.model))]
        trainer.train()
        after = embedding_parameters(base_model(trainer.model))
        return sum((b - a).norm().item() for a, b in zip(before, after, strict=True))

    assert moved(OTHERS / 4) == pytest.approx(moved(None) / 4, rel=1e-3)


def test_accelerate_splits_the_optimizer_that_comes_with_the_model() -> None:
    accelerator, model = make_accelerator(), make("both", False)
    sloth_backend.attach(accelerator, config={**QUIET, "embedding_learning_rate": RATE})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=OTHERS)
    schedule = get_scheduler("linear", optimizer, 2, 4)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for expected in (0.0, 0.5, 1.0, 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected * OTHERS, expected * RATE])
        model(**batch(0)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    sloth_backend.undo(model)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == sum(p.requires_grad for p in model.parameters())
    optimizer.step()
    schedule.step()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    switch = {**QUIET, "embedding_learning_rate": RATE}
    with pytest.raises(SlothConfigError, match="optimize\\(\\) sees no optimizer"):
        sloth_backend.optimize(make("both", False), config=switch)
    with pytest.raises(SlothConfigError, match="no embedding trains"):
        make_trainer(tmp_path, peft_config=lora(), backend=switch)
    with pytest.raises(SlothConfigError, match="together with its one optimizer"):
        sloth_backend.attach(make_accelerator(), config=switch).prepare(make("both", False))
    model = make("both", False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OTHERS)
    schedule = CosineAnnealingLR(optimizer, 10)
    for schedules, named in (([schedule], "CosineAnnealingLR"), ([], "a schedule that was not handed over")):
        with pytest.raises(SlothConfigError, match=named):
            split_groups(optimizer, embedding_parameters(model.get_base_model()), RATE, schedules)
    with pytest.raises(SlothConfigError, match="holds the embeddings"):
        split_groups(torch.optim.SGD([torch.zeros(1)]), model.parameters(), RATE)


@pytest.mark.slow
def test_a_split_optimizer_is_saved_and_resumed(tmp_path: Path) -> None:
    def run(steps: int, resume: bool = False) -> list[dict[str, Any]]:
        args = make_args(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        switch = {**QUIET, "embedding_learning_rate": RATE}
        trainer = make_trainer(tmp_path, args=args, peft_config=lora(modules_to_save=list(BOTH)), backend=switch)
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if "loss" in log]

    whole = run(4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(4, resume=True)
    assert [log["loss"] for log in resumed] == pytest.approx([log["loss"] for log in whole], rel=1e-6)
