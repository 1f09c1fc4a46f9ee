"""Which width fits, against trying them all."""

import itertools

import pytest

from scala_cli.deploy.budget import choose, excess
from scala_cli.errors import PointError
from scala_cli.settings import Budget

ROWS = [
    {"ratio": 0.25, "params": 1.5e6, "gmacs": 0.37, "latency_ms": 3.0, "memory_mb": 9.0, "top1": 58.7},
    {"ratio": 0.5, "params": 5.7e6, "gmacs": 1.25, "latency_ms": 6.0, "memory_mb": 30.0, "top1": 68.3},
    {"ratio": 0.75, "params": 12.6e6, "gmacs": 2.66, "latency_ms": 5.9, "memory_mb": 60.0, "top1": 73.3},
    {"ratio": 1.0, "params": 22.1e6, "gmacs": 4.6, "latency_ms": 16.0, "memory_mb": 95.0, "top1": 76.1},
]


def fits(row, limits):
    return all(
        row[name[4:]] >= limit if name[:3] == "min" else row[name[4:]] <= limit for name, limit in limits
    )


def test_the_widest_that_fits_every_budget():
    """Every combination of limits, each at, just below and just above what a width has."""
    names = ("max_gmacs", "max_params", "max_latency_ms", "max_memory_mb", "min_top1")
    edges = {
        name: [None, *(row[name[4:]] * f for row in ROWS[:3:2] for f in (1, 0.999, 1.001))] for name in names
    }
    for values in itertools.product(*edges.values()):
        limits = [(name, limit) for name, limit in zip(names, values, strict=True) if limit is not None]
        budget = Budget(**dict(limits))
        rows = [{**row, "fits": excess(row, budget) <= 1} for row in ROWS]
        wanted = [row["ratio"] for row in ROWS if fits(row, limits)]
        if not wanted:
            with pytest.raises(PointError):
                choose(rows, budget)
        else:
            assert choose(rows, budget)["ratio"] == (wanted[0] if budget.min_top1 is not None else wanted[-1])


def test_where_nothing_fits_the_closest_is_named():
    def chosen(**limits):
        budget = Budget(**limits)
        return choose([{**row, "fits": excess(row, budget) <= 1} for row in ROWS], budget)

    with pytest.raises(PointError, match=r"closest is 0\.25 with latency_ms 3") as error:
        chosen(max_latency_ms=2)
    assert (error.value.remedy, error.value.facts) == ("closest_ratio", {"ratio": "0.25"})
    with pytest.raises(PointError, match=r"closest is 1 with top1 76\.1"):
        chosen(min_top1=80)
    with pytest.raises(PointError, match=r"closest is 0\.25"):
        chosen(max_gmacs=0)


def test_accuracy_that_nobody_measured_does_not_fit():
    assert excess({**ROWS[0], "top1": None}, Budget(min_top1=1)) == float("inf")
    assert excess({**ROWS[0], "top1": None}, Budget(max_gmacs=1)) <= 1


def test_slice_by_budget(scala, tiny):
    half = scala("info", tiny, "--json").json["points"][1]
    told = scala(
        "slice", tiny, "--max-params", half["params"], "--max-gmacs", 99, "-o", "half", "--json"
    ).json
    assert told["ratio"] == 0.5 and told["params"] == half["params"]
    assert [row["fits"] for row in told["candidates"]] == [True, True, False, False]

    measured = scala(
        "slice", tiny, "--max-latency-ms", 1e6, "--max-memory-mb", 1e6, "--threads", 1, "-o", "all", "--json"
    ).json
    assert measured["ratio"] == 1
    assert all(row["latency_ms"] > 0 and row["memory_mb"] >= 0 for row in measured["candidates"])

    answer = scala("slice", tiny, "--min-top1", 50)
    assert answer.code == 2 and "top1 not known" in answer.stderr
    assert scala("slice", tiny, "--max-params", 1).code == 2
    assert scala("slice", tiny, "--ratio", "0.5", "--max-params", 1).code == 2
    assert scala("slice", tiny).code == 2
    assert scala("slice", tiny, "--max-params", 1e9, "--threads", 1).code == 2
    assert "not empty" in scala("slice", tiny, "--max-latency-ms", 1e6, "-o", "half").stderr
