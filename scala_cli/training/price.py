"""What training costs: multiply-accumulates of an image, minutes of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from scala_cli.measure import cost
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point
from scala_cli.training.run import METRICS

STEPS = 1000


def training_gmacs(gmacs: Mapping[Point, float], method: MethodSettings, pretrained: bool) -> float:
    """GMACs that one training image costs: a backward pass counts as two forwards.

    The widths that a method draws are averaged over 1,000 steps.

    Args:
        gmacs: of one forward at each width; the teacher's is taken to be the largest.
        pretrained: whether the start can teach.
    """
    kind = METHODS[method.method]
    teacher = max(gmacs.values()) if pretrained and kind.taught and method.teacher != "none" else 0.0
    if method.method == "separate":
        return round(sum(3 * each + teacher for each in gmacs.values()), 4)
    drawn: list[float] = []

    def student(_: Tensor, point: Point) -> Tensor:
        drawn.append(gmacs[point])
        return torch.zeros(1, 2)

    images, targets = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for step in range(STEPS):
        for _ in kind(tuple(gmacs), method).passes(student, images, targets, None, Random(step)):
            pass
    return round(3 * sum(drawn) / STEPS + teacher, 4)


def gmacs_of(net: SlimmableViT) -> dict[Point, float]:
    """Of one forward of one image at every width."""
    return {point: cost(net.spec.at(point))["gmacs"] for point in net.points}


def price_of_run(net: SlimmableViT, record: Record, checkpoint: Path) -> dict[str, float] | None:
    """What the run that wrote a checkpoint has spent; None where none of all widths lies beside it.

    Returns:
        {"minutes", "separate"}: of its training, with that of a new head; and how many times the
        multiply-accumulates of an image the separate training of each width takes, with the same teacher.
    """
    run = checkpoint.resolve().parent
    files = [file for file in (run / METRICS, run / "teacher" / METRICS) if file.is_file()]
    if record.method in (None, "separate") or not files:
        return None
    try:
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        minutes = sum(row["minutes"] for row in rows)
    except (ValueError, KeyError, TypeError):  # of another tool
        return None
    gmacs = gmacs_of(net)
    taught = bool(record.provenance.get("teacher"))
    joint, apart = (
        training_gmacs(gmacs, MethodSettings(method=method), taught)  # type: ignore[arg-type]
        for method in (record.method, "separate")
    )
    return {"minutes": round(minutes, 3), "separate": round(apart / joint, 3)}
