"""Finds the best point of a family within a budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scala_cli.bench.run import bench
from scala_cli.cost import gmacs, pareto
from scala_cli.deploy.predict import predict, work_of
from scala_cli.errors import PointError
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import BenchSettings, Budget, DeviceSettings
from scala_cli.slicing.point import Point
from scala_cli.tasks import TASKS, task_named
from scala_cli.tasks.base import main_column
from scala_cli.watch import Watcher

MEASURED = ("latency_ms", "memory_mb")
"""Columns that must be measured on the machine itself."""
LEAST = 1e-3
"""Smaller measurements, in ms or MB, count as this when a prediction is fitted."""
FIRST, NEXT, MORE = 8, 4, 8
"""Points of a large family measured first and in each later turn; and how many more than the first are
measured until only measured points are considered."""

Rows = list[dict[str, Any]]


def candidates(
    net: SlimmableViT,
    record: Record,
    points: Sequence[Point],
    budget: Budget,
    where: DeviceSettings,
    watch: Watcher,
) -> Rows:
    """Returns a row for each point with the columns that the budget limits.

    Latency and memory of up to FIRST points are measured. In a larger family only those of `measured_first`
    are, and the others are predicted. Then the chosen point and the next best are measured, NEXT in all, and
    the prediction is fitted again, until the chosen point is one that was measured. If none fits, those that
    miss by the least are measured. After FIRST + MORE measurements only measured points get a row.

    Returns:
        per point its columns, "params", "gmacs", the task's first metric (None if not known) and "fits"; if
        limited also "latency_ms" and "memory_mb", with "predicted": True if these are predicted.

    Raises PointError if the budget sets a top-1 and the task has none.
    """
    task = task_named(record.task)
    main = main_column(task)
    if budget.min_top1 is not None and not task.labelled:
        raise PointError(
            "this model gives features: it has no top-1.", remedy="leave_out", setting="min-top1"
        )
    work = {point: work_of(net.spec_at(point)) for point in points}
    known = {
        point: {
            "params": int(params),
            "gmacs": gmacs(macs),
            main: record.measured(point, main),
        }
        for point, (_, params, macs, _) in work.items()
    }
    columns = [name for name, _, _ in budget.limits() if name in MEASURED]
    if not columns:
        return judged(known, {}, budget)
    settings = BenchSettings(batch_size=1, runtime=budget.runtime)
    measured: dict[Point, dict[str, float | None]] = {}
    todo = measured_first(known, main)
    while todo:
        for row in bench(net, record, todo, (), settings, where, watch)["points"]:
            measured[Point.of_row(row)] = {name: row[name] for name in columns}
        found = {**predicted(work, measured, columns), **measured}
        if len(measured) >= FIRST + MORE:
            found = {point: row for point, row in found.items() if point in measured}
        rows = judged({point: known[point] for point in points if point in found}, found, budget)
        fitting = ranked(rows, budget)
        wanted = [Point.of_row(row) for row in fitting or nearest_first(rows, budget)]
        if fitting and wanted[0] in measured:
            break
        todo = [point for point in wanted if point not in measured][:NEXT]
    return rows


def predicted(
    work: Mapping[Point, Sequence[float]],
    measured: Mapping[Point, Mapping[str, float | None]],
    columns: Sequence[str],
) -> dict[Point, dict[str, Any]]:
    """Returns the columns of all points, predicted from those measured; None if the runtime reports none."""
    rows: dict[Point, dict[str, Any]] = {point: {"predicted": True} for point in work}
    for name in columns:
        # the fit minimises relative error, so zeros need a small value
        seen = {point: max(row[name] or 0, LEAST) for point, row in measured.items() if row[name] is not None}
        guesses = predict(work, seen) if seen else {}
        for point, row in rows.items():
            row[name] = round(guesses[point], 3) if guesses else None
    return rows


def measured_first(known: Mapping[Point, Mapping[str, Any]], metric: str) -> list[Point]:
    """Returns FIRST points, from little to much work: of those that no other beats in work and accuracy.

    If predictions fail, the choice is among measured points, so these have to be good ones. Without known
    accuracies, or if there are too few such points, others are added.
    """
    points = sorted(known, key=lambda point: known[point]["gmacs"])
    places = [(known[point]["gmacs"], known[point][metric]) for point in points]
    front = [points[n] for n in pareto(places)] if all(gain is not None for _, gain in places) else []
    chosen = spread(front, FIRST)
    others = [point for point in points if point not in chosen]
    return [*chosen, *spread(others, FIRST - len(chosen))]


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """Returns `count` points, spread evenly from the first to the last; all if there are no more."""
    if count < 2:
        return [*points[:count]]
    last = len(points) - 1
    places = range(len(points)) if last < count else [round(n * last / (count - 1)) for n in range(count)]
    return [points[place] for place in places]


def judged(
    known: Mapping[Point, Mapping[str, Any]], found: Mapping[Point, Mapping[str, Any]], budget: Budget
) -> Rows:
    """Returns a row for each point from its `known` and `found` columns, with "fits"."""
    rows = [{**point.columns(), **row, **found.get(point, {})} for point, row in known.items()]
    return [{**row, "fits": excess(row, budget) <= 1} for row in rows]


def gain(row: Mapping[str, Any], rows: Rows) -> tuple[float, float]:
    """Returns a row's sort key; the best row has the largest.

    It is the accuracy, then less work. If the accuracy of any row is unknown, it is more work.
    """
    metric = next((name for name in map(main_column, TASKS.values()) if name in row), "")
    spent = row.get("gmacs") or 0
    if metric and all(each.get(metric) is not None for each in rows):
        return row[metric], -spent
    return spent, 0.0


def ranked(rows: Rows, budget: Budget) -> Rows:
    """Returns the rows that fit, best first; or cheapest first, if the budget sets an accuracy.

    The cheapest has the least of the column `price_of` names.
    """
    fitting = [row for row in rows if row["fits"]]
    if budget.min_top1 is None:
        return sorted(fitting, key=lambda row: (gain(row, rows), Point.of_row(row)), reverse=True)
    name = price_of(budget)
    return sorted(fitting, key=lambda row: (row.get(name) or 0, Point.of_row(row)))


def price_of(budget: Budget) -> str:
    """Returns the column to minimise: the first with an upper limit, or the multiply-accumulates."""
    return next((name for name, _, least in budget.limits() if not least), "gmacs")


def nearest_first(rows: Rows, budget: Budget) -> Rows:
    """Returns the rows from the smallest `excess` to the largest."""
    return sorted(rows, key=lambda row: excess(row, budget))


def choose(rows: Rows, budget: Budget) -> dict[str, Any]:
    """Returns the best row that fits. Raises PointError if none does, naming the closest."""
    if fitting := ranked(rows, budget):
        return fitting[0]
    nearest = nearest_first(rows, budget)[0]
    ratio = Point.of_row(nearest).label
    has = ", ".join(f"{name} {amount(nearest.get(name))}" for name, _, _ in budget.limits())
    raise PointError(
        f"no width fits; the closest is {ratio} with {has}.", remedy="closest_ratio", ratio=ratio
    )


def alternatives(rows: Rows, budget: Budget) -> dict[str, dict[str, Any]]:
    """Returns {"second": the next best row that fits, "better": the cheapest better row that does not}."""
    chosen, price = choose(rows, budget), price_of(budget)
    dearer = [
        row for row in rows if not row["fits"] and row.get(price) and gain(row, rows) > gain(chosen, rows)
    ]
    found = {
        "second": next(iter(ranked(rows, budget)[1:]), None),
        "better": min(dearer, key=lambda row: row[price], default=None),
    }
    return {name: row for name, row in found.items() if row is not None}


def amount(value: float | None) -> str:
    """Formats a number with four digits."""
    return "not known" if value is None else f"{value:.4g}"


def is_measured(budget: Budget) -> bool:
    """Returns whether the budget limits a column that must be measured on this machine."""
    return any(name in MEASURED for name, _, _ in budget.limits())


def excess(row: Mapping[str, Any], budget: Budget) -> float:
    """Returns the factor by which a row misses its worst limit; at most 1 if it fits."""
    factors = [0.0]
    for name, limit, least in budget.limits():
        value = row.get(name)
        if value is None:
            return math.inf
        over, under = (limit, value) if least else (value, limit)
        factors.append(math.inf if not under and over else over / (under or 1))
    return max(factors)
