"""From a name a user knows (MODEL) to a slimmable ViT."""

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

TOLERANCE = 1e-3
"""Of the largest logit; other weights differ by far more, rounding by far less."""


@dataclass(frozen=True)
class Changes:
    """How the model is to differ from the one its name stands for; None keeps what it has.

    Args:
        num_classes: classes of a new head.
        img_size: pixels a side; timm resamples the position embedding.
        patch_size: pixels a side; timm resamples the patch embedding.
    """

    num_classes: int | None = None
    img_size: int | None = None
    patch_size: int | None = None

    def given(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def words(self) -> list[str]:
        """The options of `scala finetune` that say the same."""
        return [
            word for name, size in self.sizes().items() for word in (f"--{name.replace('_', '-')}", str(size))
        ]

    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in self.given().items() if name != "num_classes"}


@dataclass(frozen=True)
class Opened:
    """A model as it was opened.

    Args:
        net: the slimmable model.
        record: what is known of it.
        original: timm's own model on the weights of the source as they came, with the source's eps.
    """

    net: SlimmableViT
    record: Record
    original: VisionTransformer


def open_model(
    model: str, points: Sequence[Point] | None, changes: Changes | None = None, **how: Any
) -> tuple[SlimmableViT, Record]:
    """Pretrained weights as a slimmable model: the same function at full width, sliceable at `points`.

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
    """Pretrained weights as a slimmable model, beside timm's own model on them.

    Args:
        points: the widths; None gives a checkpoint of the Scala authors its own, others the default ones.
        model: an alias (`deit_s`), a timm name, `hf-hub:org/repo`, a directory in timm's format, or a
            weight file that names its architecture, or a directory of transformers.
        weights: a file (.safetensors, or a pickle that holds tensors only) to read instead of downloading.
        scratch: random weights.
        average: take the moving average that a weight file of a training script holds beside the weights.
        heads: of a file that does not tell, as those of the authors of SuperViT, LV-ViT and SiT; None is one
            for 64 channels.

    Raises:
        CheckpointError: unknown name, no network, unreadable or unfitting weights, unsupported model.
        PointError: a width that does not divide the model's channels.
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
    torch.manual_seed(0)  # random weights, or a new head, are the same on every call
    state = source.weights() if source.weights and not scratch else None
    vit = create(config, state, changes.num_classes, pretrained=state is None and not scratch).eval()
    refuse_broken(vit, str(weights or model))
    came_with: Any = vit.pretrained_cfg
    features = about.get("features", False)
    if features and changes.num_classes is not None:
        # what the head gives are features, also where these are as many as the classes
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
    """Returns what leads back to the channels a checkpoint had before; empty for any other model.

    Args:
        about: what it tells of itself.
        state: its weights; the head of a model for features leads back too, which another will not.
    """
    if not about or "sliced_from" in about:
        return {}
    known = original_of(read_extra(resolve(model)))
    if state and new_head and about.get("features"):
        known |= {WEIGHT: state["head.weight"], BIAS: state["head.bias"]}
    return known


def refuse_trained(model: str, about: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a family of widths that has been trained."""
    if about.get("method") and "sliced_from" not in about:
        raise CheckpointError(
            f"{model} is a trained family of widths; converting it again would mix them up.",
            remedy="train_family",
            model=model,
        )


def refuse_uncut(config: Config, points: Sequence[Point]) -> None:
    """Raises CheckpointError or PointError for a model that cannot be cut so, without its weights."""
    spec = describe(skeleton_of(config))
    check_patches(spec)
    for point in points:
        spec.at_point(point)


def record_of(
    model: str, weights: Path | None, scratch: bool, source: Source, about: Mapping[str, Any], new_head: bool
) -> Record:
    """What is known of a model that was just opened.

    Args:
        about: what the checkpoint or slice tells of itself, where it is one.
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
    """A checkpoint of the Scala authors' release, which is a trained family of widths already."""
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
    """A checkpoint of the SuperViT authors' release: a trained family of sizes and shares of tokens."""
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
    """The largest difference of logits between `net`, as timm builds its checkpoint, and the original.

    Raises CheckpointError where it is more than rounding, if they are to be exact.
    """
    probe = random_images(net.spec, 2)
    expected = original(probe)
    found = net.spec.build_with(net.vit.state_dict())(probe)
    difference = (found - expected).abs().max().item()
    if exact and not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
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
    """A slimmable checkpoint as it is, or with other widths; any other MODEL converted on the fly.

    Args:
        ratios: "0.25,0.5,..."; None keeps a checkpoint's own, and gives a MODEL the default ones.
        changes, weights: as `open_source`, of a MODEL only.
        scratch: a MODEL gets random weights.
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
    """A checkpoint, or any other MODEL at the sizes of `spec`, without its classifier.

    Raises as `open_slimmable` and `for_task`.
    """
    height, width = spec.input_size[1:]
    tall, wide = spec.patch_size
    sizes = Changes(None, height if height == width else None, tall if tall == wide else None)
    changes = None if is_checkpoint(name) else sizes
    return for_task(*open_slimmable(name, None, changes, watch=watch), "features")[0]


def is_checkpoint(name: str) -> bool:
    """Whether a name stands for a slimmable checkpoint; an alias never does, a slice is an ordinary model."""
    about = about_of(name)
    return bool(about) and "sliced_from" not in about


def about_of(name: str) -> dict[str, Any]:
    """What the checkpoint, or the slice, of that name tells of itself; nothing of anything else."""
    if name in ALIASES:
        return {}
    try:
        directory = directory_of(name) if name.startswith(HUB) else resolve(name)
        about = read_config(directory).get("scala") if directory else None
    except CheckpointError:
        return {}
    return about if isinstance(about, dict) else {}
