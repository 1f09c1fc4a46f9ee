"""Opens the model that a user names (MODEL) as a slimmable ViT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.authors import is_scala, open_scala
from scala_cli.models.checkpoint import Record, load_with_record, read_extra
from scala_cli.models.config import Config
from scala_cli.models.create import check_patches, create, refuse_broken, skeleton_of
from scala_cli.models.features import for_task, give_identity_head
from scala_cli.models.foreign import Source
from scala_cli.models.locate import ALIASES, path_of, read_config, resolve, short_name
from scala_cli.models.named import HUB, directory_of, find_source, weight_file
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.stream import norms_with_eps, with_eps
from scala_cli.models.supervit import is_supervit, open_supervit
from scala_cli.models.vit import Spec, describe, random_images
from scala_cli.settings import DEFAULT_RATIOS
from scala_cli.slicing.original import BIAS, WEIGHT, original_of
from scala_cli.slicing.point import Point, find_point, parse_points, widths_of
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import Layout
from scala_cli.watch import QUIET, Watcher

BUILD_TOLERANCE = 1e-3
"""Largest allowed difference of logits, relative to the largest logit (rounding is far below it)."""


@dataclass(frozen=True)
class Changes:
    """Changes to the named model; None changes nothing.

    Args:
        num_classes: number of classes of a new head.
        img_size: side of the images in pixels; timm resamples the position embedding.
        patch_size: side of the patches in pixels; timm resamples the patch embedding.
    """

    num_classes: int | None = None
    img_size: int | None = None
    patch_size: int | None = None

    def given(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def words(self) -> list[str]:
        """Returns the changed sizes as options of `scala finetune`."""
        return [
            word for name, size in self.sizes().items() for word in (f"--{name.replace('_', '-')}", str(size))
        ]

    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in self.given().items() if name != "num_classes"}


@dataclass(frozen=True)
class Opened:
    """An opened model.

    Args:
        net: the slimmable model.
        record: its record.
        original: timm's model on the unchanged weights of the source, with the source's eps.
    """

    net: SlimmableViT
    record: Record
    original: VisionTransformer


def open_model(
    model: str, points: Sequence[Point] | None, changes: Changes | None = None, **how: Any
) -> tuple[SlimmableViT, Record]:
    """Opens pretrained weights as a slimmable model: the same function at full width, sliceable at `points`.

    Arguments and errors are those of `open_source`.
    """
    opened = open_source(model, points, changes, **how)
    return opened.net, opened.record


def open_source(
    model: str,
    points: Sequence[Point] | None,
    changes: Changes | None = None,
    *,
    weights: Path | None = None,
    scratch: bool = False,
    average: bool = False,
    layout: Layout = "aligned",
    heads: int | None = None,
    watch: Watcher = QUIET,
) -> Opened:
    """Opens pretrained weights as a slimmable model, together with timm's model on the same weights.

    Args:
        model: an alias (`deit_s`), a timm name, `hf-hub:org/repo`, a directory in the format of timm or
            transformers, or a weight file that names its architecture.
        points: the points; None means the trained ones of a family by Scala's or SuperViT's authors, and the
            default widths for any other model.
        weights: a file (.safetensors, or a pickle that holds tensors only) to read instead of downloading.
        scratch: use random weights.
        average: take the moving average that a training script saved beside the weights.
        heads: number of heads, for files that do not show it, as those of the authors of SuperViT, LV-ViT
            and SiT; None means one per 64 channels.

    Raises:
        CheckpointError: for an unknown name, no network, unreadable or misfit weights, an unsupported model.
        PointError: for a width that does not divide the model's channels.
    """
    changes = changes or Changes()
    source = find_source(model, weights, scratch, average, heads)
    for note in source.notes:
        watch.note(note)
    file = str(weights or model)
    if is_scala(source):
        return open_family(source, file, points, changes, layout)
    if (weights or weight_file(model)) and source.weights and is_supervit(source.weights()):
        return open_sizes(source, file, points, changes, layout, heads)
    about = {} if scratch or weights else about_of(model)
    refuse_trained(model, about)
    counted = {"num_heads": heads} if heads else {}
    config = source.config.with_args(**changes.sizes(), **counted)
    points = points or parse_points(DEFAULT_RATIOS)
    refuse_uncut(config, points)
    torch.manual_seed(0)  # makes random weights and new heads reproducible
    state = source.weights() if source.weights and not scratch else None
    vit = create(config, state, changes.num_classes, pretrained=state is None and not scratch).eval()
    refuse_broken(vit, str(weights or model))
    came_with: Any = vit.pretrained_cfg
    features = about.get("features", False)
    if features and changes.num_classes is not None:
        # the head outputs features: replace it even if there are as many of them as classes
        vit.reset_classifier(changes.num_classes)
    new_head = vit.num_classes != came_with.get("num_classes") or (features and bool(changes.num_classes))
    original, vit = vit, describe(vit, config.model_args).build_with(vit.state_dict())
    features = give_identity_head(vit) or (features and not new_head)
    record = record_of(model, weights, scratch, source, about, new_head and not features)
    record = replace(record, task="features" if features else record.task)
    if changes.sizes():
        record = replace(record, provenance={**record.provenance, "options": changes.words()})
    spec = replace(describe(vit, config.model_args), features=features)
    if source.eps is not None and not scratch:
        original = norms_with_eps(original, source.eps)
        vit = spec.build_with(with_eps(vit.state_dict(), spec, source.eps))
    original_tensors = {} if scratch else original_tensors_of(model, about, state, new_head)
    rule = Rule(widths_of(points), spec.num_heads, layout=layout)
    net = SlimmableViT(vit, spec, rule, original_tensors, points)
    return Opened(net, record, original)


def original_tensors_of(
    model: str, about: Mapping[str, Any], state: Mapping[str, Tensor] | None, new_head: bool
) -> dict[str, Tensor]:
    """Returns the tensors that map back to a checkpoint's original channels; {} for any other model.

    Args:
        about: the "scala" object of its config.json.
        state: its weights. The head of a model for features is such a map too, and is kept here when a new
            head replaces it.
    """
    if not about or "sliced_from" in about:
        return {}
    known = original_of(read_extra(resolve(model)))
    if state and new_head and about.get("features"):
        known |= {WEIGHT: state["head.weight"], BIAS: state["head.bias"]}
    return known


def refuse_trained(model: str, about: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a trained family; a single full width that was trained is none.

    Args:
        about: the "scala" object of its config.json.
    """
    alone = about.get("ratios") == ["1"] and "points" not in about
    if about.get("method") and "sliced_from" not in about and not alone:
        raise CheckpointError(
            f"{model} is a trained family of widths; converting it again would mix them up.",
            remedy="train_family",
            model=model,
        )


def refuse_uncut(config: Config, points: Sequence[Point]) -> None:
    """Raises CheckpointError or PointError if a model cannot be cut to these points; loads no weights."""
    spec = describe(skeleton_of(config))
    check_patches(spec)
    for point in points:
        spec.at_point(point)


def record_of(
    model: str, weights: Path | None, scratch: bool, source: Source, about: Mapping[str, Any], new_head: bool
) -> Record:
    """Returns the record of a newly opened model.

    Args:
        about: the "scala" object of a checkpoint or a slice; {} for any other model.
    """
    file = weights or weight_file(model)
    called = model
    if file and weights is None:
        called = source.config.architecture
    called = short_name(called) if path_of(called) else called
    former = {} if about.get("method") else about.get("provenance") or about.get("sliced_from") or {}
    weights_of = "random" if scratch else file.name if file else former.get("weights", called)
    trained = not scratch and about.get("trained", True)
    return Record(
        trained,
        order=about.get("order"),
        provenance={"model": called, "weights": weights_of},
        new_head=trained and (about.get("new_head", False) or new_head),
    )


def open_family(
    source: Source, file: str, points: Sequence[Point] | None, changes: Changes, layout: Layout
) -> Opened:
    """Opens a checkpoint released by the Scala authors: an already trained family of widths."""
    if changes.given() or layout == "fused":
        raise CheckpointError(
            f"{file} is a family of widths by Scala's authors; it is converted as it is.",
            remedy="leave_as_it_is",
        )
    net, original = open_scala(source, file)
    refuse_broken(original, file)
    for point in points or ():
        find_point(point, net.points)
    origin = {"model": source.config.architecture, "weights": Path(file).name}
    record = Record(method="scala", order="none", provenance=origin)
    return Opened(net.with_points(points or net.points).eval(), record, original)


def open_sizes(
    source: Source,
    file: str,
    points: Sequence[Point] | None,
    changes: Changes,
    layout: Layout,
    heads: int | None,
) -> Opened:
    """Opens a checkpoint released by the SuperViT authors: a trained family of sizes and shares of tokens."""
    if changes.given() or layout == "fused":
        raise CheckpointError(
            f"{file} is a family of sizes by SuperViT's authors; it is converted as it is.",
            remedy="leave_as_it_is",
        )
    net, original = open_supervit(source, heads, file)
    refuse_broken(original, file)
    chosen = [net.find(point) for point in points or net.points]
    origin = {"model": net.spec.architecture, "weights": Path(file).name}
    record = Record(method="supervit", order="none", provenance=origin)
    return Opened(net.with_points(chosen).eval(), record, original)


@torch.inference_mode()
def distance(net: SlimmableViT, original: VisionTransformer, exact: bool = True) -> float:
    """Returns the largest difference of logits between `net`, rebuilt by timm, and the original.

    Args:
        exact: raise CheckpointError if the difference is more than rounding.
    """
    probe = random_images(net.spec, 2)
    expected = original(probe)
    found = net.spec.build_with(net.vit.state_dict())(probe)
    difference = (found - expected).abs().max().item()
    if exact and not difference <= BUILD_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(
            f"the checkpoint would not compute what its source does: the logits differ by {difference:.2g}; "
            "nothing was written.",
            remedy="report",
        )
    return difference


def open_slimmable(
    name: str,
    ratios: str | None,
    changes: Changes | None = None,
    *,
    weights: Path | None = None,
    scratch: bool = False,
    watch: Watcher = QUIET,
) -> tuple[SlimmableViT, Record]:
    """Opens a slimmable checkpoint, or converts any other MODEL on the fly.

    Args:
        ratios: "0.25,0.5,..."; None means a checkpoint's own points, and the default widths for a MODEL.
        changes, weights, scratch: as in `open_source`; not for a checkpoint.
    """
    if is_checkpoint(name):
        if weights or (changes and changes.given()):
            raise CheckpointError(
                f"{name} is a slimmable checkpoint: its weights and sizes are what they are.",
                remedy="keep_sizes",
            )
        net, record = load_with_record(resolve(name))
        return (net.with_points(parse_points(ratios)) if ratios else net), record
    points = parse_points(ratios) if ratios else None
    return open_model(name, points, changes, weights=weights, scratch=scratch, watch=watch)


def open_backbone(name: str, spec: Spec, watch: Watcher = QUIET) -> SlimmableViT:
    """Opens a checkpoint, or any other MODEL at the sizes of `spec`, without its classifier.

    Raises as `open_slimmable` and `for_task`.
    """
    height, width = spec.input_size[1:]
    tall, wide = spec.patch_size
    sizes = Changes(None, height if height == width else None, tall if tall == wide else None)
    changes = None if is_checkpoint(name) else sizes
    return for_task(*open_slimmable(name, None, changes, watch=watch), "features")[0]


def is_checkpoint(name: str) -> bool:
    """Whether a name means a slimmable checkpoint; an alias or a slice does not."""
    about = about_of(name)
    return bool(about) and "sliced_from" not in about


def about_of(name: str) -> dict[str, Any]:
    """Returns the "scala" object of the checkpoint or slice of this name; {} for anything else."""
    if name in ALIASES:
        return {}
    try:
        directory = directory_of(name) if name.startswith(HUB) else resolve(name)
        about = read_config(directory).get("scala") if directory else None
    except CheckpointError:
        return {}
    return about if isinstance(about, dict) else {}
