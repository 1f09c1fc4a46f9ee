"""Which width fits: the widest within what may be spent, or the narrowest that is good enough."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scala_cli.bench.run import bench
from scala_cli.cost import cost
from scala_cli.errors import PointError
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import BenchSettings, Budget, DeviceSettings
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.tasks.base import main_column
from scala_cli.watch import Watcher

MEASURED = {"latency_ms", "memory_mb"}
"""What is known only on the machine itself."""


def candidates(
    net: SlimmableViT, record: Record, budget: Budget, where: DeviceSettings, watch: Watcher
) -> list[dict[str, Any]]:
    """Every trained width, narrowest first, with all that the budget asks for.

    Returns:
        per width {"ratio", "params", "gmacs", "top1"}, where they are asked for "latency_ms" and "memory_mb"
        as well, and "fits".
    """
    task = task_named(record.task)
    main = main_column(task)
    if budget.min_top1 is not None and not task.labelled:
        raise PointError(
            "this model gives features: it has no top-1.", remedy="leave_out", setting="min-top1"
        )
    if is_measured(budget):
        rows = bench(net, record, net.points, (), BenchSettings(batch_size=1), where, watch)["points"]
    else:
        rows = [
            {**point.columns(), **cost(net.spec_at(point)), main: record.measured(point, main)}
            for point in net.points
        ]
    names = ["params", "gmacs", main, *(name for name, _, _ in limits_of(budget))]
    return [
        {
            **Point.of_row(row).columns(),
            **{name: row.get(name) for name in dict.fromkeys(names)},
            "fits": excess(row, budget) <= 1,
        }
        for row in rows
    ]


def choose(rows: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """The widest row that fits; where accuracy is asked for, the narrowest.

    Raises PointError where none fits, naming the one that comes closest.
    """
    fitting = [row for row in rows if row["fits"]]
    if fitting:  # of widths the narrowest or the widest
        pick = min if budget.min_top1 is not None else max
        return pick(fitting, key=lambda row: (row.get("gmacs") or 0, Point.of_row(row)))
    closest = min(rows, key=lambda row: excess(row, budget))
    ratio = Point.of_row(closest).label
    has = ", ".join(f"{name} {shown(closest.get(name))}" for name, _, _ in limits_of(budget))
    raise PointError(
        f"no trained width fits; the closest is {ratio} with {has}.", remedy="closest_ratio", ratio=ratio
    )


def shown(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def is_measured(budget: Budget) -> bool:
    """Whether the machine has to be asked."""
    return bool(MEASURED & {name for name, _, _ in limits_of(budget)})


def limits_of(budget: Budget) -> list[tuple[str, float, bool]]:
    """What is asked for: the column of a row, the limit, whether that is the least instead of the most."""
    given = {name: limit for name, limit in asdict(budget).items() if limit is not None}
    return [(name[4:], limit, name.startswith("min_")) for name, limit in given.items()]


def excess(row: dict[str, Any], budget: Budget) -> float:
    """By what factor a row misses its worst limit; at most 1 where it fits."""
    factors = [0.0]
    for name, limit, least in limits_of(budget):
        value = row.get(name)
        if value is None:
            return math.inf
        over, under = (limit, value) if least else (value, limit)
        factors.append(math.inf if not under and over else over / (under or 1))
    return max(factors)
