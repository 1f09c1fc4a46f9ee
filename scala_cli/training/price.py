"""Cost of training: multiply-accumulates per image, minutes of a run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean

import yaml

from scala_cli.cost import macs
from scala_cli.methods import METHODS, ONE_POINT, method_named
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import MethodSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.training.run import ARGS, METRICS

STEPS = 1000


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image's forward pass.

    Args:
        points: for each trained point.
        full: for the full-width model, which teaches even if it is not one of the points.
    """

    points: Mapping[Point, int]
    full: int

    @classmethod
    def of(cls, net: SlimmableViT) -> "Macs":
        points = {point: macs(net.spec_at(point)) for point in net.points}
        return cls(points, macs(replace(net.spec, tsm={})))


def training_macs(macs: Macs, method: MethodSettings, task: str, pretrained: bool) -> float:
    """Returns the multiply-accumulates per training image; a backward pass counts as two forwards.

    The drawn points are averaged over STEPS steps. For a method that trains one point per run, the runs of
    all points are added up.

    Args:
        task: a name of tasks.TASKS.
        pretrained: whether the start is trained, so that it can teach.
    """
    kind, purpose = method_named(method.method), task_named(task)
    teaches = not purpose.labelled or ("teacher" in kind.parts and method.teacher != "none")
    passes = 2 if purpose.masks(method) else 1
    teacher = macs.full if pretrained and teaches else 0
    families = [(point,) for point in macs.points] if kind.one_point else [tuple(macs.points)]
    ready = [kind(points, method, purpose) for points in families]
    return sum(
        teacher
        + fmean(3 * passes * sum(macs.points[p] for p in each.draw(Random(step))) for step in range(STEPS))
        for each in ready
    )


def price_of_run(net: SlimmableViT, record: Record, checkpoint: Path) -> dict[str, float] | None:
    """Returns the cost of the run that wrote a checkpoint; None if no run of all widths did.

    Returns:
        {"minutes", "separate"}: minutes of training, including those of a new head; and the
        multiply-accumulates per image of training each width separately, with the same teacher, relative to
        this run.
    """
    run = checkpoint.resolve().parent
    parts = [part for part in (run, run / "teacher") if (part / METRICS).is_file()]
    if record.method not in METHODS or method_named(record.method).one_point or not parts:
        return None
    try:
        minutes = sum(map(minutes_of, parts))
        chosen, *alone = map(settings_of, parts)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # not files of this package
        return None
    counted, taught = Macs.of(net), bool(record.provenance.get("teacher"))
    joint, apart = (
        training_macs(counted, method, record.task, taught)
        for method in (chosen.method, replace(chosen.method, method=ONE_POINT))
    )
    share = sum(each.optimizer.epochs for each in alone) / chosen.optimizer.epochs
    return {
        "minutes": round(minutes, 3),
        "separate": round(apart / (joint + 3 * counted.full * share), 3),
    }


def minutes_of(run: Path) -> float:
    """Returns the minutes of training of all epochs of a run."""
    return sum(
        json.loads(line)["minutes"] for line in (run / METRICS).read_text(encoding="utf-8").splitlines()
    )


def settings_of(run: Path) -> Settings:
    """Returns the settings that a run began with."""
    return Settings.of(yaml.safe_load((run / ARGS).read_text(encoding="utf-8")))
