"""Several processes: one budget for all of them, whatever shapes come to each and in what order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration_tests import child

RANK = """
import json, sys
import torch.distributed as dist
from integration_tests.plugins.layer_programs.common import llama, plans_of, switched_on, train
from integration_tests.sameness.architectures import make_batches
from sloth_plugins.layer_programs import planner

rank, budgets, lengths = int(sys.argv[1]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
planner.device_budget = lambda device, config: budgets[rank]
planned, plans = planner.Planner.planned, {}

def noted(self, shape, device):
    plan = planned(self, shape, device)
    plans[shape.length] = [plan.budget_bytes, [sorted(level.kept) for level in plan.levels]]
    return plan

planner.Planner.planned = noted
model = switched_on(llama()).train()
for length in lengths[rank]:
    train(model, make_batches(1, length=length))
print(json.dumps(plans))
dist.destroy_process_group()
"""
PLENTY, LENGTHS = 1 << 40, [[12, 40, 24], [24, 12]]


def plans(budgets: list[int], meeting: Path) -> list[dict[str, tuple[int, list[list[str]]]]]:
    """Of both ranks: length of a row -> budget, and what each layer keeps."""
    arguments = meeting, json.dumps(budgets), json.dumps(LENGTHS)
    ranks = child.fork(*(child.Start(RANK, (rank, *arguments)) for rank in range(2)), timeout=240)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(rank.stderr[-3000:] for rank in ranks)
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks]


def test_ranks_plan_with_the_least_of_their_budgets(tmp_path: Path) -> None:
    first, second = plans([PLENTY, 1], tmp_path / "short")
    assert list(first) == ["12", "40", "24"]
    assert list(second) == ["24", "12"]
    assert {budget for ranks in (first, second) for budget, _ in ranks.values()} == {1}
    assert all(first[length] == second[length] for length in second)
    alone, _ = plans([PLENTY, PLENTY], tmp_path / "plenty")
    assert all(alone[length] != first[length] and any(alone[length][1]) for length in first)


SHARDED = """
from dataclasses import replace
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from integration_tests.plugins.layer_programs.common import switched_on
from integration_tests.sameness.architectures import make_model
from sloth_plugins.layer_programs.layer import documents_shape
from sloth_plugins.program_layers import planner_of

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
model = switched_on(make_model("llama"), memory="fastest").train()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
planner, fixed = planner_of(model), []
for gathers_as in (None, torch.bfloat16):
    planner.run, planner.fixed_bytes = replace(planner.run, gathers_as=gathers_as), None
    fixed.append([planner._fixed(planner.device, alone) for alone in (True, False)])
shards = sum(p._local_tensor.nbytes for p in model.parameters())
print(fixed[0][1] - fixed[0][0], fixed[1][1] - fixed[1][0], shards, sum(p.nbytes for p in model.parameters()))
"""


def test_gradients_that_wait_for_the_last_pass_of_a_step_are_whole() -> None:
    (done,) = child.fork(child.Start(SHARDED), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    more, more_in_half, shards, whole = map(int, done.stdout.split())
    assert whole == pytest.approx(4 * shards, rel=0.01)
    assert (more, more_in_half) == (whole - shards, whole // 2 - shards)
