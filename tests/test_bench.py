"""`nflows-iresnet bench`: rounds, ratios and exponents as described, targets as computed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nflows_iresnet.experiments.bench import BASELINE, ITEMS, OURS, Column, Item, our_speed
from nflows_iresnet.experiments.bench.measure import (
    Benchmark,
    Case,
    CaseResult,
    Measurement,
    Rounds,
    Run,
    Timing,
    Work,
    check_targets,
    fits,
    measure_runs,
    series,
    spread,
    time_in_rounds,
    time_once,
    trusts_cpu_time,
)
from nflows_iresnet.experiments.options import BenchOptions

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

TINY = BenchOptions(device="cpu", quick=True, repeats=2)


class ScriptedTimer:
    """Returns times from a script, and notes whose work it was given."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds
        self.order: list[str] = []

    def __call__(self, work: Work) -> Timing:
        name = str(work())
        self.order.append(name)
        seconds = self.seconds[name][self.order.count(name) - 1]
        return Timing(seconds, seconds / 2)


def named(*names: str) -> dict[str, Work]:
    return {name: partial(str, name) for name in names}


# --- rounds ---------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_rotate() -> None:
    timer = ScriptedTimer({name: [1.0] * 3 for name in "abc"})
    time_in_rounds(named("a", "b", "c"), timer, Rounds(least=3, most=3))
    assert timer.order == [*"abc", *"bca", *"cab"]


def test_rounds_end_when_the_time_is_used_up() -> None:
    rounds = Rounds(least=2, most=10, seconds=5.0)
    for each, expected in ((0.1, 10), (1.0, 3), (100.0, 2)):
        timer = ScriptedTimer({name: [each] * 10 for name in "ab"})
        result = time_in_rounds(named("a", "b"), timer, rounds)
        assert [len(times) for times in result.times.values()] == [expected] * 2


def test_warm_ups_are_not_timed() -> None:
    calls: list[int] = []
    result = time_in_rounds(
        {"a": lambda: calls.append(1)}, time_once, Rounds(least=3, most=3, warm_ups=4)
    )
    assert len(calls) == 7
    assert len(result.times["a"]) == 3


@pytest.mark.parametrize("healthy_calls", [0, 1, 3], ids=["first", "warm-up", "timed"])
def test_one_that_fails_leaves_and_the_others_go_on(healthy_calls: int) -> None:
    left = iter(range(healthy_calls))

    def work() -> object:
        if next(left, None) is None:
            raise RuntimeError("out of luck")
        return "a"

    result = time_in_rounds({"a": work, "b": lambda: "b"}, time_once, Rounds(least=4, most=4))
    assert list(result.times) == ["b"]
    assert len(result.times["b"]) == 4
    assert "out of luck" in result.failures["a"]


# --- statistics -----------------------------------------------------------------------------------


def test_ratios_are_paired_by_round() -> None:
    """The machine is ten times slower in one round: the paired ratio does not notice."""
    result = scripted_result(ours=[1.0, 10.0, 1.1, 0.9], normflows=[2.0, 20.0, 2.2, 1.8])
    assert result.time_ratio(BASELINE, OURS, cpu=False) == pytest.approx((2.0, 2.0, 2.0))
    assert result.time_ratio(BASELINE, "absent", cpu=False) is None


def test_ratio_of_unequal_rounds_is_refused() -> None:
    measured = (Measurement(OURS, (1.0, 2.0)), Measurement(BASELINE, (1.0, 2.0, 3.0)))
    with pytest.raises(ValueError, match="shorter"):
        CaseResult("i", "c", {}, measured, False).time_ratio(BASELINE, OURS, cpu=False)


def test_spread() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert spread([]) is None


def sizes(x: list[float], y: list[float]) -> list[CaseResult]:
    """Return results of a model of which a size y is measured where n is x."""
    return [
        CaseResult("item", "c", {"n": each}, (Measurement(OURS, numbers={"size": size}),), True)
        for each, size in zip(x, y, strict=True)
    ]


GROWING = Item("grows", lambda options: [], variable="n", fitted="size")


def test_planted_power_law_is_recovered() -> None:
    x = [1.0, 3.0, 10.0, 30.0, 100.0]
    y = [7 * n**1.7 * e for n, e in zip(x, [1.02, 0.99, 1.0, 1.01, 0.98], strict=True)]
    (fit,) = fits(GROWING, sizes(x, y))
    assert (fit.model, fit.variable, fit.quantity) == (OURS, "n", "size")
    assert fit.standard_error is not None
    assert fit.exponent == pytest.approx(1.7, abs=3 * fit.standard_error)
    covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)[1]
    assert fit.standard_error == pytest.approx(float(covariance[0, 0]) ** 0.5)
    assert fit.factor == pytest.approx(7, rel=0.05)
    (fit,) = fits(GROWING, sizes([1.0, 2.0], [1.0, 8.0]))
    assert fit.exponent == pytest.approx(3.0)
    assert fit.standard_error is None


def test_cases_that_differ_in_more_than_the_variable_are_not_joined() -> None:
    """A model of two blocks is no point of the law of one of six."""

    def measured(n: float, blocks: float, size: float) -> CaseResult:
        found = (Measurement(OURS, numbers={"size": size}),)
        return CaseResult("item", "c", {"n": n, "blocks": blocks}, found, True)

    results = [measured(n, 6, n**2) for n in (1, 2, 4)] + [measured(8, 2, 3.0)]
    (fit,) = fits(GROWING, results)
    assert fit.exponent == pytest.approx(2.0)
    assert fit.fixed == {"blocks": 6.0}
    assert [len(each.points) for each in series(GROWING, results)] == [3, 1]


@pytest.mark.parametrize(("x", "y"), [([2.0, 2.0], [1.0, 3.0]), ([1.0, 2.0], [1.0, 0.0]), ([], [])])
def test_no_power_law_of_what_has_none(x: list[float], y: list[float]) -> None:
    assert fits(GROWING, sizes(x, y)) == []


def scripted_result(**seconds: list[float]) -> CaseResult:
    def prepare(options: BenchOptions) -> list[Run]:
        return [Run(name, partial(str, name)) for name in seconds]

    rounds = len(next(iter(seconds.values())))
    measured = measure_runs(prepare, BenchOptions(repeats=rounds), ScriptedTimer(seconds))
    return CaseResult("step-dimension", "case", {"d": 2.0}, measured, on_cpu_time=True)


def test_targets_are_computed() -> None:
    result = scripted_result(ours=[1.0, 2.0, 1.0], normflows=[3.0, 8.0, 3.0], plain=[0.5, 1, 0.5])
    item = ITEMS["step-dimension"]
    found = {each.target: each for each in check_targets(item, [result])}
    assert found["step at d = 2, times faster"].measured == 3.0
    assert found["step at d = 2, times faster"].is_met
    assert found["step beside the plain net, times slower"].measured == 2.0
    assert len(found) == 2
    slower = scripted_result(ours=[1.0, 2.0, 1.0], normflows=[2.9, 5.0, 2.9], plain=[0.3, 1, 0.3])
    assert not any(each.is_met for each in check_targets(item, [slower]))


def test_numbers_that_fail_keep_the_times() -> None:
    def numbers() -> dict[str, float]:
        raise MemoryError("too large")

    (measured,) = Case.timed(lambda options: [Run(OURS, list, numbers)]).measure(TINY)
    assert len(measured.seconds) == 2
    assert measured.numbers == {}
    assert "too large" in str(measured.note)


def test_nothing_measured_meets_no_target() -> None:
    result = CaseResult("item", "case", {"d": 2.0}, (Measurement(OURS, note="failed"),), True)
    assert [each.is_met for each in check_targets(ITEMS["step-dimension"], [result])] == [
        False,
        False,
    ]


def test_targets_follow_the_clock_of_the_settings() -> None:
    measured = (Measurement(OURS, (1.0,), (1.0,)), Measurement(BASELINE, (10.0,), (2.0,)))
    for on_cpu_time, expected in ((True, 2.0), (False, 10.0)):
        assert our_speed(CaseResult("i", "c", {}, measured, on_cpu_time)) == expected
    assert trusts_cpu_time(BenchOptions(device="cpu"))
    assert not trusts_cpu_time(BenchOptions(device="cpu", threads=2))
    assert not trusts_cpu_time(BenchOptions(device="cuda"))


def test_a_column_at_cost_multiplies_by_the_time() -> None:
    measured = (
        Measurement(OURS, (2e-3,), (2e-3,), {"mse": 3.0}),
        Measurement(BASELINE, (4e-3,), (4e-3,), {"mse": 6.0}),
    )
    result = CaseResult("i", "c", {}, measured, True)
    column = Column("mse", "MSE * ms", times_milliseconds=True)
    assert result.value_of(OURS, column) == pytest.approx(6.0)
    assert result.ratio_of(OURS, column) == pytest.approx(4.0)


# --- the file -------------------------------------------------------------------------------------


def test_the_file_is_read_again_and_older_ones_are_refused() -> None:
    result = scripted_result(ours=[1.0, 2.0], normflows=[3.0, 8.0])
    record = replace(Benchmark.begin({}, "cpu"), results=(result,))
    text = record.as_json()
    assert Benchmark.from_json(text).results == (result,)
    plain = json.loads(text)
    assert plain["results"][0]["measurements"][0]["model"] == OURS
    row = next(each for each in plain["table"] if each["model"] == OURS)
    assert row["wall_ratio"] == {"median": 3.5, "low": 3.25, "high": 3.75}
    with pytest.raises(ValueError, match=r"no results of this command \(format 2\)"):
        Benchmark.from_json(json.dumps({**plain, "format": 1}))


PUBLISHED = sorted((Path(__file__).parents[1] / "examples/results").glob("bench*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_are_those_of_their_samples(path: Path) -> None:
    text = path.read_text()
    record = Benchmark.from_json(text)
    for name in Benchmark.DERIVED:
        assert json.loads(record.as_json())[name] == json.loads(text)[name]
