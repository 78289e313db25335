"""The judge of the training benchmark: what losses pass, what fails, and which bars hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from integration_tests.benchmarks.training import judge, results
from integration_tests.benchmarks.training.bars import BARS, Bar, faster
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.benchmarks.training.workloads import WORKLOADS

STOCK = [11.8, 11.7, 11.6]


def result(contender: str = "stock", losses: list[float] | None = None, **others: Any) -> results.Result:
    """A finished run of ``full``."""
    figures = {"step_seconds": 1.0, "tokens_per_second": 1.0, "peak_gib": 1.0, "reserved_gib": 1.0, "base_gib": 1.0}
    name = {"workload": "full", "contender": contender, "round": 0, "batch": 2, "length": 2048, "status": "ok"}
    return {**name, **figures, "losses": STOCK if losses is None else losses, **others}


def suite(*runs: results.Result) -> results.Suite:
    return {"results": list(runs), "absent": {}}


def verdict(*runs: results.Result) -> judge.LossVerdict:
    """On the first run."""
    return judge.judge_losses(suite(*runs))[0]


def test_losses_within_the_floor_are_equal() -> None:
    near = result("sloth", [loss + 0.9 * judge.FLOOR for loss in STOCK])
    assert verdict(near, result()).verdict == "equal"


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("wrong", [2 * judge.FLOOR, -2 * judge.FLOOR, math.nan, math.inf])
def test_one_wrong_loss_of_ours_fails_the_benchmark(step: int, wrong: float) -> None:
    losses = list(STOCK)
    losses[step] += wrong
    runs = (result("sloth", losses), result())
    assert verdict(*runs).verdict == "differs"
    assert not judge.passes(suite(*runs))


def test_a_wrong_loss_of_another_is_marked_and_fails_nothing() -> None:
    runs = (result("axolotl", [12.8, 12.7, 12.6]), result())
    assert verdict(*runs).verdict == "differs"
    assert judge.passes(suite(*runs))


def test_too_few_losses_differ() -> None:
    assert verdict(result("sloth", STOCK[:2]), result()).verdict == "differs"
    assert verdict(result("sloth", []), result()).verdict == "differs"


@pytest.mark.parametrize(("contender", "round_"), [("stock", 1), ("stock-fp32", 0)])
def test_stock_s_own_noise_widens_the_bound_from_its_step_on(contender: str, round_: int) -> None:
    noisy = result(contender, [11.8, 11.72, 11.6], round=round_)
    assert judge.loss_bounds(result(), [noisy]) == pytest.approx([judge.FLOOR, judge.FLOOR + 0.02, judge.FLOOR + 0.02])
    assert verdict(result("sloth", [11.8, 11.7, 11.615]), result(), noisy).verdict == "equal"
    assert verdict(result("sloth", [11.815, 11.7, 11.6]), result(), noisy).verdict == "differs"


def test_a_shorter_truth_bounds_the_steps_after_it() -> None:
    truth = result("stock-fp32", [11.8, 11.71])
    assert judge.loss_bounds(result(), [truth]) == pytest.approx([judge.FLOOR, judge.FLOOR + 0.01, judge.FLOOR + 0.01])


def test_other_contenders_do_not_widen_the_bound() -> None:
    runs = (result("sloth", [12.0, 11.7, 11.6]), result(), result("liger", [12.0, 11.7, 11.6]))
    assert verdict(*runs).verdict == "differs"


def test_where_stock_ran_out_of_memory_the_next_reference_counts() -> None:
    oom = {**result(), "status": "oom"}
    found = verdict(result("sloth", [12.0, 11.7, 11.6]), oom, result("liger"))
    assert (found.verdict, found.reference) == ("differs", "liger")


def test_without_a_reference_nothing_is_claimed() -> None:
    assert verdict(result("sloth")).verdict == "unjudged"


def test_failures_of_ours_fail_and_running_out_of_memory_does_not() -> None:
    broken = {**result("sloth"), "status": "error", "error": "ValueError: no"}
    assert not judge.passes(suite(broken, result()))
    assert judge.passes(suite({**broken, "contender": "liger"}, result()))
    assert judge.passes(suite({**result("sloth"), "status": "oom"}, result()))


def bar_verdict(bar: Bar, *runs: results.Result, monkeypatch: pytest.MonkeyPatch) -> judge.BarVerdict:
    monkeypatch.setattr(judge, "BARS", (bar,))
    return judge.judge_bars(suite(*runs))[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [(1.0, 3.2, True), (1.0, 3.1, False)],
)
def test_speed_against_another(ours: float, theirs: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (result("sloth", step_seconds=ours), result(step_seconds=theirs))
    assert bar_verdict(faster("full", "sloth", 3.2, "stock"), *runs, monkeypatch=monkeypatch).holds is holds


def test_absolute_bars_take_the_median_of_times_and_the_largest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [result("sloth", step_seconds=s, peak_gib=s, round=i) for i, s in enumerate((0.8, 0.9, 5.0))]
    time, memory = Bar("full", "sloth", "step_seconds", 0.92), Bar("full", "sloth", "peak_gib", 4.0)
    assert bar_verdict(time, *runs, monkeypatch=monkeypatch) == judge.BarVerdict(time, 0.9, 0.92, True)
    assert bar_verdict(memory, *runs, monkeypatch=monkeypatch) == judge.BarVerdict(memory, 5.0, 4.0, False)


def test_out_of_memory_misses_a_bar_of_ours_and_loses_one_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = faster("full", "sloth", 2.0, "unsloth")
    ours, theirs = result("sloth"), result("unsloth")
    oom = {"status": "oom"}
    assert bar_verdict(bar, {**ours, **oom}, theirs, monkeypatch=monkeypatch).holds is False
    assert bar_verdict(bar, ours, {**theirs, **oom}, monkeypatch=monkeypatch).holds is True
    assert bar_verdict(bar, ours, monkeypatch=monkeypatch).holds is None
    assert bar_verdict(bar, theirs, monkeypatch=monkeypatch).holds is None


def test_bars_name_what_exists() -> None:
    for bar in BARS:
        assert bar.point in WORKLOADS[bar.workload].points
        assert bar.contender in CONTENDERS
        assert bar.versus in ("", *CONTENDERS)
        assert bar.figure in {field.name for field in dataclasses.fields(results.Figures)}
