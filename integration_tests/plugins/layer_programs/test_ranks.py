"""Several processes: one budget for all of them, whatever shapes come to each and in what order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    arguments = [str(meeting), json.dumps(budgets), json.dumps(LENGTHS)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]


def test_ranks_plan_with_the_least_of_their_budgets(tmp_path: Path) -> None:
    first, second = plans([PLENTY, 1], tmp_path / "short")
    assert list(first) == ["12", "40", "24"]
    assert list(second) == ["24", "12"]
    assert {budget for ranks in (first, second) for budget, _ in ranks.values()} == {1}
    assert all(first[length] == second[length] for length in second)
    alone, _ = plans([PLENTY, PLENTY], tmp_path / "plenty")
    assert all(alone[length] != first[length] and any(alone[length][1]) for length in first)
