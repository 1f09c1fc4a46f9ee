"""One width as files that stand alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from scala_cli.cost import cost
from scala_cli.deploy.card import model_card
from scala_cli.errors import CheckpointError
from scala_cli.files import refuse_occupied, whole_directory
from scala_cli.models.checkpoint import Record, TensorByTensor, read_about, versions, write_timm
from scala_cli.models.locate import CARD, FILES, WEIGHTS, resolve, short_name
from scala_cli.models.slimmable import Ratio
from scala_cli.models.views import fill
from scala_cli.models.vit import random_images, refuse_misfit
from scala_cli.slicing.point import Point, find_point
from scala_cli.watch import QUIET, Watcher

TOLERANCE = 1e-5
"""Largest difference of logits in fp32 between the family at a width and the slice read back."""


@torch.inference_mode()
def slice_model(
    checkpoint: str | Path,
    ratio: Ratio,
    target: str | Path,
    force: bool = False,
    watch: Watcher = QUIET,
) -> dict[str, Any]:
    """Writes one width of a checkpoint as a directory that timm loads by itself.

    Before it takes its place it is read back by timm and compared with the family's forward at that width,
    timm's own on views of the full weights. These are never in memory as a whole.

    Returns:
        {"path", "ratio", "params", "gmacs", "max_abs_diff"}

    Raises:
        PointError: a width that was not trained.
        CheckpointError: where the slice read back by timm differs; nothing is left behind then.
    """
    checkpoint, target = resolve(checkpoint), Path(target)
    full, rule, record = read_about(checkpoint)
    point = find_point(ratio, map(Point, rule.ratios))
    refuse_occupied(target, force, FILES, source=checkpoint)
    spec = full.at(point.ratio)
    size = cost(spec)
    result = {
        "path": str(target),
        **point.columns(),
        "params": size["params"],
        "gmacs": size["gmacs"],
    }
    about = {
        "sliced_from": record.provenance,
        "trained": record.trained,
        "new_head": record.new_head,
        "ratio": point.label,
        "method": record.method,
        "metrics": [m for m in record.metrics if Point.of_row(m) == point],
        "versions": versions(),
    }
    weights, probe = TensorByTensor(checkpoint / WEIGHTS), random_images(spec, 1)
    views, skeleton = rule.slice_state(weights, point.ratio), spec.build(slim=True)
    refuse_misfit(skeleton, views, weights.file)
    tell_untrained(record, [point], watch)
    fill(skeleton, views)
    expected = skeleton(probe)  # as SlimmableViT.forward
    del views, skeleton
    with whole_directory(target) as fresh:
        write_timm(rule.slice_state(weights, point.ratio, copy=True), spec, about, fresh)
        card = model_card(target.name, spec, record, [result], family=False)
        (fresh / CARD).write_text(card, encoding="utf-8")
        again = timm.create_model(f"local-dir:{fresh}", pretrained=True).eval()
        difference = (again(probe) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"the slice read back by timm differs by {difference:.2g}, "
                f"more than {TOLERANCE:g}; nothing was written.",
                remedy="report",
            )
    return {**result, "max_abs_diff": difference}


def tell_untrained(record: Record, points: Sequence[Point], watch: Watcher) -> None:
    if told := record.untrained(points):
        watch.note(f"{told}: scala finetune CKPT --data DIR")


def default_target(named: str | None, checkpoint: Path, suffix: str) -> Path:
    """Where what is made of a checkpoint goes unless told: beside the user, named after it.

    Args:
        named: what the user calls that; on the Hub it is the repository, not the cache, that gives the name.
        checkpoint: where it lies.
        suffix: "0.5" of one width.
    """
    checkpoint = checkpoint.resolve()
    name = checkpoint.parent.name if checkpoint.name in ("best", "last") else checkpoint.name
    if named and named.startswith("hf-hub:"):
        name = short_name(named.partition("@")[0])
    return Path(f"{name}-{suffix}")
