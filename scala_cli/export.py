"""One width as files that stand alone."""

from functools import partial
from pathlib import Path
from typing import Any

import timm

from scala_cli.errors import CheckpointError
from scala_cli.files import refuse_occupied, whole_directory
from scala_cli.measure import cost, largest_difference
from scala_cli.models.checkpoint import Record, versions, write_timm
from scala_cli.models.locate import CARD, FILES
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.report import model_card
from scala_cli.slicing.point import Point, find_point

TOLERANCE = 1e-5
"""Largest difference of logits in fp32 between the supernet at a width and the slice read back."""


def export_slice(
    net: SlimmableViT, record: Record, point: Point, target: Path, force: bool = False
) -> dict[str, Any]:
    """Writes one width as a directory that timm loads by itself, after reading it back and comparing.

    Returns:
        {"path", "ratio", "params", "gmacs", "max_abs_diff"}

    Raises:
        PointError: a width that was not trained.
        CheckpointError: where the slice read back by timm differs; nothing is left behind then.
    """
    point = find_point(point, net.points)
    refuse_occupied(target, force, FILES)
    spec = net.spec.at(point)
    size = cost(spec)
    result = {
        "path": str(target),
        "ratio": float(point.ratio),
        "params": size["params"],
        "gmacs": size["gmacs"],
    }
    about = {
        "sliced_from": record.provenance,
        "ratio": point.label,
        "method": record.method,
        "metrics": [m for m in record.metrics if Point.of(m["ratio"]) == point],
        "versions": versions(),
    }
    with whole_directory(target) as fresh:
        write_timm(net.slice(point), spec, about, fresh)
        (fresh / CARD).write_text(model_card(target.name, spec, record, result))
        again = timm.create_model(f"local-dir:{fresh}", pretrained=True).eval()
        result["max_abs_diff"] = largest_difference(again, partial(net, ratio=point), spec)
        if not result["max_abs_diff"] <= TOLERANCE:
            raise CheckpointError(
                f"the slice read back by timm differs by {result['max_abs_diff']:.2g}, "
                f"more than {TOLERANCE:g}; nothing was written.",
                "Please report this with the output of: scala env",
            )
    return result


def default_target(checkpoint: Path, point: Point) -> Path:
    """Where a slice goes unless told: beside the user, named after the run or directory it is cut from."""
    checkpoint = checkpoint.resolve()
    name = checkpoint.parent.name if checkpoint.name in ("best", "last") else checkpoint.name
    return Path(f"{name}-{point.label.replace('/', '_')}")
