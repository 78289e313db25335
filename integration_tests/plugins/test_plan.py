"""The memory plan as pure functions: against all plans there are, where those are few, and as it must behave anyway."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth_backend.plan import Cached, Costs, Level, MemoryPlan, Mode, choose, describe, measured, peak_bytes, planned

GIB = 1 << 30
LEVELS = st.builds(
    Level,
    st.sampled_from(["keep", "recompute"]),
    device_bytes=st.integers(0, 30),
    host_bytes=st.integers(0, 9),
    seconds=st.integers(0, 40).map(lambda n: n / 8),
    working_bytes=st.integers(0, 30),
)


def as_layer(levels: list[Level]) -> tuple[Level, ...]:
    """Levels of one layer, one of which needs no host memory, the fastest first."""
    levels = [*levels[1:], dataclasses.replace(levels[0], host_bytes=0)]
    return tuple(sorted(levels, key=lambda level: level.seconds))


def stack(kinds: list[tuple[Level, ...]], count: int) -> tuple[tuple[Level, ...], ...]:
    """``count`` layers of alternating kinds."""
    return tuple(itertools.islice(itertools.cycle(kinds), count))


@st.composite
def any_costs(draw: st.DrawFn, most_layers: int = 12) -> Costs:
    """Layers whose levels have nothing to do with each other."""
    kinds = draw(st.lists(st.lists(LEVELS, min_size=1, max_size=5).map(as_layer), min_size=1, max_size=3))
    layers = stack(kinds, draw(st.integers(0, most_layers)))
    fixed, head, forward = (draw(st.integers(0, 60)) for _ in range(3))
    return Costs(64, layers, fixed, head, forward, draw(dense(len(layers))))


@st.composite
def program(draw: st.DrawFn) -> tuple[Level, ...]:
    """Levels as a program has them: ever more of its values kept, those first whose recomputation takes long a byte."""
    values = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 64)), min_size=1, max_size=4))
    values.sort(key=lambda value: Fraction(value[1], value[0]), reverse=True)
    x, gradients = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    levels = []
    for n in range(len(values) + 1):
        kept, seconds = x + sum(size for size, _ in values[:n]), sum(seconds for _, seconds in values[n:]) / 64
        again = sum(size for size, _ in values[n:])
        levels.append(Level(f"keep {n}", device_bytes=kept, seconds=seconds, working_bytes=gradients + again))
    slowest = levels[0]
    offload = {"device_bytes": 0, "host_bytes": x, "seconds": slowest.seconds + 1 / 128}
    levels.append(dataclasses.replace(slowest, name="offload", working_bytes=slowest.working_bytes + 2 * x, **offload))
    return tuple(sorted(levels, key=lambda level: level.seconds))


@st.composite
def program_costs(draw: st.DrawFn) -> Costs:
    """One to four layers that run as programs, of one or two kinds."""
    layers = stack(draw(st.lists(program(), min_size=1, max_size=2)), draw(st.integers(1, 4)))
    fixed, head, forward = (draw(st.integers(0, 60)) for _ in range(3))
    return Costs(64, layers, fixed, head, forward, draw(dense(len(layers))))


@st.composite
def dense(draw: st.DrawFn, count: int) -> Cached | None:
    """Dense weights, of one size in all layers as in most models, or none."""
    size, seconds = draw(st.integers(0, 30)), draw(st.integers(0, 32)) / 64
    return draw(st.sampled_from([None, Cached((size,) * count, (seconds,) * count)]))


def seconds_of(levels: tuple[Level, ...], cached: int, costs: Costs) -> float:
    """Time against the fastest levels with no dense weights."""
    saved = sum(costs.cached.seconds_per_layer[:cached]) if costs.cached else 0.0
    return sum(level.seconds for level in levels) - saved


def all_plans(costs: Costs, host_budget: int | None) -> Iterator[tuple[int, float]]:
    """Peak and seconds of every plan there is."""
    for levels in itertools.product(*costs.layers):
        if host_budget is None or sum(level.host_bytes for level in levels) <= host_budget:
            for cached in range(len(costs.layers) + 1 if costs.cached else 1):
                yield peak_bytes(levels, cached, costs), seconds_of(levels, cached, costs)


def largest_step(costs: Costs) -> float:
    """The most that one layer can gain."""
    return max(slow.seconds - fast.seconds for levels in costs.layers for slow in levels for fast in levels)


def step_by_step(levels: tuple[Level, ...], cached: int, costs: Costs) -> int:
    """The peak as the largest of all moments of a step, each written out."""
    weights = sum(costs.cached.bytes_per_layer[:cached]) if costs.cached else 0
    held = base = costs.fixed_bytes + weights
    moments = [base + costs.head_bytes]
    for level in levels:
        held += level.device_bytes
        moments.append(held + costs.forward_bytes)
    moments.append(held + max(costs.head_bytes, costs.forward_bytes))
    for level in reversed(levels):
        moments.append(held + level.working_bytes)
        held -= level.device_bytes
    assert held == base
    return max(moments)


@given(any_costs(), st.integers(0, 400), st.none() | st.integers(0, 40), st.sampled_from(["auto", "least", "fastest"]))
@settings(max_examples=150, deadline=None)
def test_a_plan_says_what_it_takes(costs: Costs, budget: int, host: int | None, mode: Mode) -> None:
    plan = choose(costs, budget, host, mode)
    assert len(plan.levels) == len(costs.layers)
    assert all(level in levels for level, levels in zip(plan.levels, costs.layers, strict=True))
    assert plan.predicted_peak_bytes == peak_bytes(plan.levels, plan.cached_layers, costs)
    assert plan.predicted_peak_bytes >= step_by_step(plan.levels, plan.cached_layers, costs)
    assert plan.fits == (plan.predicted_peak_bytes <= budget)
    assert host is None or sum(level.host_bytes for level in plan.levels) <= host
    assert (plan.tokens, plan.budget_bytes) == (costs.tokens, budget)


@given(any_costs())
@settings(max_examples=100, deadline=None)
def test_the_peak_is_the_largest_of_all_moments(costs: Costs) -> None:
    for mode in ("least", "fastest"):
        plan = choose(costs, None, None, mode)
        moments = step_by_step(plan.levels, plan.cached_layers, costs)
        assert plan.predicted_peak_bytes == (moments if costs.layers else max(moments, costs.fixed_bytes))


@given(any_costs(), st.none() | st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_more_budget_is_never_slower_and_never_fits_less(costs: Costs, host: int | None) -> None:
    top = choose(costs, None, host, "fastest").predicted_peak_bytes
    plans = [choose(costs, budget, host) for budget in range(0, top + 20, 7)]
    for less, more in itertools.pairwise(plans):
        assert more.fits or not less.fits
        if less.fits:
            slower = seconds_of(less.levels, less.cached_layers, costs)
            assert seconds_of(more.levels, more.cached_layers, costs) <= slower + 1e-9


@given(any_costs(), st.integers(0, 400))
@settings(max_examples=50, deadline=None)
def test_equal_costs_give_equal_plans(costs: Costs, budget: int) -> None:
    """Also where nothing is shared, as on another rank."""
    copies = tuple(tuple(dataclasses.replace(level) for level in levels) for levels in costs.layers)
    assert choose(costs, budget) == choose(dataclasses.replace(costs, layers=copies), budget)


@given(any_costs(most_layers=4))
@settings(max_examples=100, deadline=None)
def test_least_has_the_least_peak_there_is(costs: Costs) -> None:
    plan = choose(costs, None, None, "least")
    assert plan.predicted_peak_bytes == min(peak for peak, _ in all_plans(costs, None))
    assert choose(costs, plan.predicted_peak_bytes).fits
    assert not choose(costs, plan.predicted_peak_bytes - 1).fits


@given(program_costs(), st.none() | st.integers(0, 20), st.data())
@settings(max_examples=150, deadline=None)
def test_time_lost_against_the_best_plan_is_small(costs: Costs, host: int | None, data: st.DataObject) -> None:
    """At most what two layers gain by their largest step, of however many layers."""
    least = choose(costs, None, host, "least").predicted_peak_bytes
    most = choose(costs, None, host, "fastest").predicted_peak_bytes
    budget = data.draw(st.integers(least, most))
    plan = choose(costs, budget, host)
    assert plan.fits
    best = min(seconds for peak, seconds in all_plans(costs, host) if peak <= budget)
    assert seconds_of(plan.levels, plan.cached_layers, costs) <= best + 2 * largest_step(costs) + 1e-9


@given(program_costs())
@settings(max_examples=50, deadline=None)
def test_fastest_has_no_faster_plan(costs: Costs) -> None:
    plan = choose(costs, 0, None, "fastest")
    best = min(seconds for _, seconds in all_plans(costs, None))
    assert seconds_of(plan.levels, plan.cached_layers, costs) == pytest.approx(best, abs=1e-9)
    assert not plan.fits or plan.predicted_peak_bytes == 0


KEEP = Level("keep", device_bytes=8, seconds=0.0, working_bytes=3)
MIDDLE = Level("keep without norms", device_bytes=5, seconds=0.2, working_bytes=6)
RECOMPUTE = Level("recompute", device_bytes=1, seconds=1.0, working_bytes=10)
OFFLOAD = Level("offload", device_bytes=0, host_bytes=1, seconds=1.01, working_bytes=12)


def test_least_keeps_what_does_not_raise_the_peak() -> None:
    """The peak is a recomputing layer's backward: what the last layer keeps is gone by then."""
    costs = Costs(64, ((KEEP, MIDDLE, RECOMPUTE),) * 6, 100, 2, 2)
    plan = choose(costs, None, None, "least")
    assert [level.name for level in plan.levels] == ["recompute"] * 5 + ["keep"]
    assert plan.predicted_peak_bytes == 100 + 6 + 10 == peak_bytes((RECOMPUTE,) * 6, 0, costs)
    with_large_head = choose(dataclasses.replace(costs, head_bytes=40), None, None, "least")
    assert [level.name for level in with_large_head.levels] == ["recompute"] * 6


def test_late_layers_keep_first() -> None:
    costs = Costs(64, ((KEEP, RECOMPUTE),) * 6, 100, 2, 2)
    for budget in range(115, 160):
        names = [level.name for level in choose(costs, budget).levels]
        assert names == sorted(names, reverse=True)
    assert [level.name for level in choose(costs, 160).levels] == ["keep"] * 6


def test_host_memory_is_spent_on_the_layers_at_the_bottom() -> None:
    costs = Costs(64, ((RECOMPUTE, OFFLOAD),) * 6, 100, 20, 2)
    names = [level.name for level in choose(costs, None, 3, "least").levels]
    assert names == ["offload"] * 3 + ["recompute"] * 3
    assert choose(costs, None, 3, "least").predicted_peak_bytes == 100 + 3 + 20
    assert {level.name for level in choose(costs, 1000, 3).levels} == {"recompute"}


def test_dense_weights_take_the_memory_that_saves_more_there() -> None:
    """A byte of dense weights saves 0.01 s, one of kept values 0.14 s, until those are used up."""
    layers = ((KEEP, RECOMPUTE),) * 4
    costs = Costs(64, layers, 0, 2, 2, Cached((10,) * 4, (0.1,) * 4))
    assert choose(costs, 34).cached_layers == 0
    assert [choose(costs, 35 + n).cached_layers for n in (0, 9, 10, 25, 40, 99)] == [0, 0, 1, 2, 4, 4]
    eager = dataclasses.replace(costs, cached=Cached((1,) * 4, (0.9,) * 4))
    assert choose(eager, 18).cached_layers == 4
    assert choose(eager, None, None, "least").cached_layers == 0


@given(any_costs(), st.none() | st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_running_out_of_memory_leads_down_to_the_least_plan(costs: Costs, host: int | None) -> None:
    plan, seen = choose(costs, None, host, "fastest"), []
    while plan is not None:
        seen.append(plan.predicted_peak_bytes)
        last, plan = plan, plan.tighter(costs, host)
        assert plan is None or plan.budget_bytes == last.predicted_peak_bytes - max(1, last.predicted_peak_bytes // 16)
    assert seen == sorted(set(seen), reverse=True)
    assert seen[-1] == choose(costs, None, host, "least").predicted_peak_bytes


def test_costs_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match=r"a level without host bytes, its levels are: 'offload'"):
        Costs(64, ((OFFLOAD,),), 0, 0, 0)
    with pytest.raises(ValueError, match=r"dense weights of 1 layers expected, got 2 bytes and 1 seconds"):
        Costs(64, ((KEEP,),), 0, 0, 0, Cached((1, 2), (1.0,)))
    with pytest.raises(ValueError, match=r"1 levels expected, one a layer, got 2"):
        peak_bytes((KEEP, KEEP), 0, Costs(64, ((KEEP,),), 0, 0, 0))


def test_eighty_layers_take_milliseconds() -> None:
    """About 3 ms; the bound leaves room for a busy machine."""
    kinds = [(KEEP, MIDDLE, RECOMPUTE, OFFLOAD), (KEEP, RECOMPUTE, OFFLOAD)]
    costs = Costs(64, stack(kinds, 80), 100, 20, 2, Cached((3,) * 80, (0.1,) * 80))
    start = time.process_time()
    for _ in range(5):
        choose(costs, 500)
    assert (time.process_time() - start) / 5 < 0.03


def test_the_plan_in_words() -> None:
    levels = (dataclasses.replace(RECOMPUTE, host_bytes=GIB),) * 3 + (MIDDLE,) * 2
    plan = MemoryPlan(levels, 2, 382 * GIB // 10, 1203 * GIB // 10, True, 16384)
    assert str(plan) == "3 recompute, 2 keep without norms"
    assert describe(plan) == (
        "layers: 3 recompute, 2 keep without norms; dense weights of 2 layers cached; 3.0 GiB in host memory; "
        "predicted peak 38.2 GiB of 120.3 at 16,384 tokens a pass"
    )
    assert describe(MemoryPlan((RECOMPUTE,))) == "layers: 1 recompute"
    assert "dense weights of 1 layer cached" in describe(MemoryPlan((RECOMPUTE,), 1))
    assert (planned(plan).action, planned(plan).reason) == ("changed", describe(plan))
    tight = dataclasses.replace(plan, budget_bytes=30 * GIB, fits=False)
    assert planned(tight).action == "warned"
    assert "38.2 GiB of 30.0" in planned(tight).reason
    assert "does not fit" in planned(tight).reason


@pytest.mark.parametrize(
    ("peak", "action", "words"),
    [
        (39.0, "changed", "measured peak 39.0 GiB, predicted 38.0"),
        (34.0, "warned", "off by more than 5%"),
        (40.5, "warned", "over the budget of 40.0"),
    ],
)
def test_the_measured_peak_in_words(peak: float, action: str, words: str) -> None:
    plan = MemoryPlan((KEEP,), 0, 38 * GIB, 40 * GIB)
    finding = measured(plan, int(peak * GIB))
    assert (finding.action, finding.capability) == (action, "memory_plan")
    assert words in finding.reason
