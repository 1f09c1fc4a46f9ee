"""The width chosen for a budget, compared with trying all widths."""

import itertools
from random import Random

import pytest
from conftest import slimmable

from scala_cli.deploy import budget as module
from scala_cli.deploy.budget import FIRST, MORE, alternatives, candidates, choose, excess
from scala_cli.deploy.predict import predict, work_of
from scala_cli.errors import PointError
from scala_cli.models.checkpoint import Record
from scala_cli.models.points import in_grid
from scala_cli.settings import Budget, DeviceSettings, GridSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import QUIET

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


def test_the_best_that_fits_every_budget():
    """Tries every combination of limits, each at, just below and just above a width's value."""
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
            with pytest.raises(PointError, match="no width fits"):
                choose(rows, budget)
        elif budget.min_top1 is None:
            assert choose(rows, budget)["ratio"] == wanted[-1]
        else:
            price = next((name[4:] for name, _ in limits if name != "min_top1"), "gmacs")
            cost = {row["ratio"]: row[price] for row in ROWS}
            assert choose(rows, budget)["ratio"] == min(wanted, key=cost.get)


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


def test_rates_that_are_never_negative_are_found_again():
    work = {n: (1.0, n % 3 + 1.0, float(n), n * n + 1.0) for n in range(12)}
    cost = {n: 2 + 0.5 * third for n, (_, _, third, _) in work.items()}
    found = predict(work, {n: cost[n] for n in (0, 3, 5, 7, 11)})
    assert all(abs(found[n] - cost[n]) < 1e-9 * cost[n] for n in work)
    falling = predict(work, {n: 10.0 - n / 2 for n in (1, 5, 11)})  # no non-negative rates fit exactly
    assert all(value >= 0 for value in falling.values()) and len(set(falling.values())) < len(falling)


@pytest.fixture
def grid():
    """Returns a family of 48 points, and each point's cost: nearly, but not quite, a sum of its work."""
    net = in_grid(slimmable(ratios="0.25,0.5,0.75,1"), GridSettings(sizes="8,12,16,24", keeps="0.5,0.7,1"))
    assert len(net.points) == 48
    random = Random(0)
    work = {point: work_of(net.spec_at(point)) for point in net.points}
    ms = {p: (0.2 + w[1] / 1e4 + w[2] / 1e5) * random.uniform(0.97, 1.03) for p, w in work.items()}
    top1 = {p: 50 + 10 * random.random() + w[2] / 1e6 for p, w in work.items()}
    metrics = [{**p.columns(), "top1": value} for p, value in top1.items()]
    return net, Record(trained=True, metrics=metrics), ms, top1


def test_a_large_grid_is_searched_with_few_measurements(grid, monkeypatch):
    """Every chosen point was measured and fits; most are the best possible."""
    net, record, ms, top1 = grid
    asked: list[Point] = []

    def bench(net, record, points, *others):
        asked.extend(points)
        return {"points": [{**p.columns(), "latency_ms": ms[p], "memory_mb": 1.0} for p in points]}

    monkeypatch.setattr(module, "bench", bench)
    right = 0
    limits = sorted(ms.values())[6::8]
    for limit in limits:
        asked.clear()
        budget = Budget(max_latency_ms=limit)
        rows = candidates(net, record, net.points, budget, DeviceSettings(), QUIET)
        point = Point.of_row(choose(rows, budget))
        assert point in asked and ms[point] <= limit
        assert len(asked) == len(set(asked)) <= FIRST + MORE
        right += top1[point] == max(top1[p] for p in net.points if ms[p] <= limit)
        second = alternatives(rows, budget).get("second")
        assert second is None or (second["fits"] and second["top1"] <= top1[point])
    assert right >= 0.6 * len(limits)
    asked.clear()
    least = min(ms, key=ms.get)
    with pytest.raises(PointError, match=f"no width fits; the closest is {least} "):
        budget = Budget(max_latency_ms=0.1)
        choose(candidates(net, record, net.points, budget, DeviceSettings(), QUIET), budget)
    assert len(asked) == len(set(asked)) == FIRST + MORE
    only = Budget(max_latency_ms=ms[least])
    rows = candidates(net, record, net.points, only, DeviceSettings(), QUIET)
    assert Point.of_row(choose(rows, only)) == least


def test_what_is_not_measured_is_said_to_be_predicted(grid, monkeypatch):
    net, record, ms, _ = grid

    def bench(net, record, points, *others):
        return {"points": [{**p.columns(), "latency_ms": ms[p], "memory_mb": 2.0} for p in points]}

    monkeypatch.setattr(module, "bench", bench)
    budget = Budget(max_latency_ms=max(ms.values()), max_memory_mb=3)
    rows = candidates(net, record, net.points, budget, DeviceSettings(), QUIET)
    for row in rows:
        assert row.get("predicted") or row["latency_ms"] == ms[Point.of_row(row)]
    assert sum("predicted" not in row for row in rows) >= FIRST


def test_the_most_accurate_is_chosen_not_the_widest():
    rows = [{**row, "fits": True} for row in ROWS]
    rows[1] = {**rows[1], "top1": 80.0}
    assert choose(rows, Budget())["ratio"] == 0.5
    found = alternatives([{**row, "fits": row["ratio"] < 0.6} for row in ROWS], Budget(max_latency_ms=6))
    assert found["second"]["ratio"] == 0.25 and found["better"]["ratio"] == 0.75
    unknown = [*rows[:3], {**rows[3], "top1": None}]
    assert choose(unknown, Budget())["ratio"] == 1


def test_runtime_without_what_is_measured(scala, tiny):
    assert scala("slice", tiny, "--max-params", 1e9, "--runtime", "onnx").code == 2
    told = scala("slice", tiny, "--max-latency-ms", 1e6, "--runtime", "nothing")
    assert told.code == 2 and "no runtime 'nothing'" in told.told


def test_memory_that_a_runtime_does_not_tell_is_not_known(grid, monkeypatch):
    """As with runtime compile: no point fits."""
    net, record, ms, _ = grid

    def bench(net, record, points, *others):
        return {"points": [{**p.columns(), "latency_ms": ms[p], "memory_mb": None} for p in points]}

    monkeypatch.setattr(module, "bench", bench)
    budget = Budget(max_memory_mb=3, runtime="compile")
    rows = candidates(net, record, net.points, budget, DeviceSettings(), QUIET)
    assert len(rows) == FIRST + MORE and not any(row["fits"] or row.get("predicted") for row in rows)
    with pytest.raises(PointError, match="memory_mb not known"):
        choose(rows, budget)
