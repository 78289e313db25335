"""The table of weak scaling."""

from __future__ import annotations

from typing import Any

from integration_tests.benchmarks.training import rows, scaling, workloads


def result(contender: str, gpus: int, tokens: float, status: str = "ok") -> dict[str, Any]:
    figures = {"step_seconds": 1.0, "tokens_per_second": tokens} if status == "ok" else {}
    return {"contender": contender, "gpus": gpus, "status": status, "device": "a GPU", **figures}


def test_shares_are_of_the_same_contender_on_one_gpu() -> None:
    found = [result("stock", 1, 100), result("sloth", 1, 300), result("stock", 2, 150), result("sloth", 2, 570)]
    assert [r["share"] for r in scaling.with_shares(found)] == [1.0, 1.0, 0.75, 0.95]


def test_nothing_is_made_up_where_something_was_not_measured() -> None:
    found = scaling.with_shares([result("stock", 1, 100, "oom"), result("stock", 2, 150), result("sloth", 2, 1)])
    assert [r["share"] for r in found] == [None, None, None]
    page = scaling.page(found, "full")
    assert "| transformers + PEFT | 1 | oom |  |  |" in page
    assert "150" in page


def test_every_process_has_rows_of_its_own(monkeypatch: Any) -> None:
    workload, point = workloads.get("full"), (2, 2048)
    alone, tokens = rows.row_count(workload, point), rows.tokens_per_step(workload, point)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rows.row_count(workload, point) == 4 * alone
    assert rows.tokens_per_step(workload, point) == 4 * tokens
