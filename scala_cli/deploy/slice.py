"""Writes one width as a directory that stands alone."""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from scala_cli.cost import cost
from scala_cli.deploy.card import model_card
from scala_cli.errors import CheckpointError
from scala_cli.files import refuse_occupied, whole_directory
from scala_cli.models.checkpoint import (
    Record,
    TensorByTensor,
    read_about,
    read_extra,
    versions,
    write_timm,
)
from scala_cli.models.fit import Fit
from scala_cli.models.fitted import FittedViT
from scala_cli.models.locate import CARD, CHECKPOINT_FILES, WEIGHTS, resolve, short_name
from scala_cli.models.slimmable import Ratio, SlimmableViT
from scala_cli.models.slimmed import apart
from scala_cli.models.views import fill
from scala_cli.models.vit import Spec, random_images, refuse_misfit
from scala_cli.slicing.own import at_size, own_vectors
from scala_cli.slicing.point import Point, find_point
from scala_cli.watch import QUIET, Watcher

RELOAD_TOLERANCE = 1e-5
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

    Before the directory is put in place, timm reads it back, and its output is compared with the family's at
    that width: timm's forward on views of the full weights, which are never in memory as a whole.

    Returns:
        {"path", "ratio", "params", "gmacs", "calibrated", "max_abs_diff"}; for an architecture of this
        package also "import": the module that registers it with timm.

    Raises:
        PointError: a width that was not trained.
        CheckpointError: the slice read back by timm differs; then nothing is left behind.
    """
    checkpoint, target = resolve(checkpoint), Path(target)
    full, rule, record, points = read_about(checkpoint)
    point = find_point(ratio, points, full.size)
    refuse_occupied(target, force, CHECKPOINT_FILES, source=checkpoint)
    spec, extra = full.at_point(point), read_extra(checkpoint)
    weights, probe = TensorByTensor(checkpoint / WEIGHTS), random_images(spec, 1)
    extra, slim = apart(extra)
    cut = partial(
        rule.slice_state,
        at_size(ChainMap(slim, weights), extra, point.size),  # type: ignore[arg-type]  # it is only read
        point.ratio,
        own=own_vectors(extra, point.ratio),
    )
    views, skeleton = cut(), spec.build(slim=True)
    refuse_misfit(skeleton, views, weights.file)
    tell_untrained(record, [point], watch)
    fill(skeleton, views)
    expected = skeleton(probe)  # as SlimmableViT.forward
    del views, skeleton
    return write_slice(target, spec, record, point, partial(cut, copy=True), expected)


@torch.inference_mode()
def slice_family(
    net: SlimmableViT, record: Record, ratio: Ratio, target: Path, force: bool = False
) -> dict[str, Any]:
    """Writes one width of a family in memory, like `slice_model`; a fitted one with its fitted weights.

    Returns:
        as `slice_model`; for a fitted width also "fit": `Fit.as_json`.
    """
    point = net.find(ratio)
    refuse_occupied(target, force, CHECKPOINT_FILES)
    piece, fit = net.slice(point), net.fits.get(point.ratio) if isinstance(net, FittedViT) else None
    spec = net.spec_at(point)
    expected = piece(random_images(spec, 1))
    record = replace(record, calibrated=record.calibrated if fit else 0)
    return write_slice(target, spec, record, point, piece.state_dict, expected, fit)


def write_slice(
    target: Path,
    spec: Spec,
    record: Record,
    point: Point,
    cut: Callable[[], Mapping[str, Tensor]],
    expected: Tensor,
    fit: Fit | None = None,
) -> dict[str, Any]:
    """Writes a slice and reads it back through timm. Raises CheckpointError if the output differs.

    Args:
        spec: the slice's spec.
        cut: returns the slice's weights; called when they are written.
        expected: the slice's output for one random image.
        fit: how well the slice was fitted to the full model.
    """
    size = cost(spec)
    result = {
        "path": str(target),
        **point.columns(),
        "params": size["params"],
        "gmacs": size["gmacs"],
        "calibrated": fit is not None,
        **({"fit": fit.as_json()} if fit else {}),
        **({"import": "scala_cli"} if spec.is_of_this_package else {}),
    }
    about = {
        "sliced_from": record.provenance,
        "trained": record.trained,
        "new_head": record.new_head,
        "ratio": point.label,
        "method": record.method,
        "metrics": [m for m in record.metrics if Point.of_row(m) == point],
        **({"calibrated": fit.as_json()} if fit else {}),
        "versions": versions(),
    }
    with whole_directory(target) as fresh:
        write_timm(cut(), spec, about, fresh)
        card = model_card(target.name, spec, record, [result], family=False, fit=fit)
        (fresh / CARD).write_text(card, encoding="utf-8")
        again = timm.create_model(f"local-dir:{fresh}", pretrained=True).eval()
        difference = (again(random_images(spec, 1)) - expected).abs().max().item()
        if not difference <= RELOAD_TOLERANCE:
            raise CheckpointError(
                f"the slice read back by timm differs by {difference:.2g}, "
                f"more than {RELOAD_TOLERANCE:g}; nothing was written.",
                remedy="report",
            )
    return {**result, "max_abs_diff": difference}


def tell_untrained(record: Record, points: Sequence[Point], watch: Watcher) -> None:
    """Notes which of the points have not been trained, if any."""
    if told := record.untrained(points):
        may_be_fitted = record.is_untrained(points) and not record.calibrated
        fit = "fit it: scala slice MODEL --data PHOTOS; or train it: " if may_be_fitted else ""
        watch.note(f"{told}: {fit}scala finetune MODEL --data DIR")


def default_target(named: str | None, checkpoint: Path, suffix: str) -> Path:
    """Returns the default output path: in the working directory, named after the checkpoint.

    Args:
        named: the user's name for it; a repository on the Hub is named after itself, not after its cache.
        checkpoint: its directory.
        suffix: the end of the name, such as "0.5" for one width.
    """
    checkpoint = checkpoint.resolve()
    name = checkpoint.parent.name if checkpoint.name in ("best", "last") else checkpoint.name
    if named and named.startswith("hf-hub:"):
        name = short_name(named.partition("@")[0])
    return Path(f"{name}-{suffix}")
