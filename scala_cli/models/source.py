"""From a name a user knows (MODEL) to a slimmable ViT."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from scala_cli.errors import CheckpointError
from scala_cli.models.authors import is_theirs, open_theirs
from scala_cli.models.checkpoint import Record, load_with_record, read_weights
from scala_cli.models.foreign import Foreign, read_foreign
from scala_cli.models.hub import NO_WEIGHTS, TRANSPORT, fail_fast_offline, fetch, unreachable
from scala_cli.models.huggingface import directory_of, read_transformers
from scala_cli.models.locate import ALIASES, CONFIG, STATE, WEIGHTS, path_of, read_config, resolve, short_name
from scala_cli.models.skeleton import without_weights
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import Spec, describe, random_images, read_off, refuse_unless_plain
from scala_cli.settings import DEFAULT_RATIOS
from scala_cli.slicing.point import Point, find_point, parse_points
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import Layout

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""How names of weight files end, so that one that is missing is not taken for a model's name."""


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


def open_model(
    model: str,
    points: Sequence[Point] | None,
    changes: Changes | None = None,
    *,
    weights: Path | None = None,
    scratch: bool = False,
    average: bool = False,
    layout: Layout = "aligned",
) -> tuple[SlimmableViT, Record]:
    """Pretrained weights as a slimmable model: the same function at full width, sliceable at `points`.

    Args:
        points: the widths; None gives a checkpoint of the Scala authors its own, others the default ones.
        model: an alias (`deit_s`), a timm name, `hf-hub:org/repo`, a directory in timm's format, or a
            weight file that names its architecture, or a directory of transformers.
        weights: a file (.safetensors, or a pickle that holds tensors only) to read instead of downloading.
        scratch: random weights.
        average: take the moving average that a weight file of a training script holds beside the weights.

    Raises:
        CheckpointError: unknown name, no network, unreadable or unfitting weights, unsupported model.
        PointError: a width that does not divide the model's channels.
    """
    foreign = given_weights(model, weights, scratch, average)
    if foreign and is_theirs(foreign):
        return open_family(foreign, str(weights or model), points, changes or Changes(), layout)
    name, args = locate(foreign.named if foreign and weights is None else model)
    about = {} if scratch or foreign else about_of(model)
    if about.get("method") and "sliced_from" not in about:
        raise CheckpointError(
            f"{model} is a trained family of widths; converting it again would mix them up.",
            f"Use it as it is: scala finetune {model} --data DIR",
        )
    if foreign:  # whose own head is kept, also where it has other classes than the model it is named after
        args.pop("num_classes", None)
        args |= foreign.args
    args |= (changes or Changes()).given()
    with without_weights():  # what cannot be sliced is refused before any download
        skeleton_spec = describe(create(name, args))
    check_patches(skeleton_spec)
    points = points or parse_points(DEFAULT_RATIOS)
    for point in points:
        skeleton_spec.at(point)
    torch.manual_seed(0)  # random weights, or a new head, are the same on every call
    vit = create(name, args, None if scratch else foreign, pretrained=not scratch)
    spec = describe(vit, args)
    net = SlimmableViT(vit.eval(), spec, Rule(tuple(sorted(points)), spec.num_heads, layout=layout))
    file = weights or weight_file(model)
    called = foreign.named if foreign and weights is None and file else model
    called = short_name(called) if path_of(called) else called
    former = {} if about.get("method") else about.get("provenance") or about.get("sliced_from") or {}
    weights_of = "random" if scratch else file.name if file else former.get("weights", called)
    came_with: Any = vit.pretrained_cfg  # describe() does not change it
    trained = not scratch and about.get("trained", True)
    new_head = about.get("new_head", False) or vit.num_classes != came_with.get("num_classes")
    origin = {"model": called, "weights": weights_of}
    return net, Record(trained, order=about.get("order"), provenance=origin, new_head=trained and new_head)


def given_weights(model: str, weights: Path | None, scratch: bool, average: bool) -> Foreign | None:
    """What a file or a directory of transformers holds, where one is named; None for timm's own weights."""
    if weights is not None and (scratch or weight_file(model)):
        raise CheckpointError("two sources of weights are given.", "Leave out --weights, or the other one.")
    if weights is None and model not in ALIASES and not average:
        directory = directory_of(model)
        if directory is not None:
            return read_transformers(directory)
    file = weights or weight_file(model)
    if file:
        return read_foreign(file, average)
    if average:
        raise CheckpointError(
            f"{model} is no file, so there is no moving average to take.", "Name the file: --weights FILE"
        )
    return None


def weight_file(model: str) -> Path | None:
    """The file of weights that MODEL names, where it does."""
    path = None if model.startswith("local-dir:") else path_of(model)
    return path if path and path.is_file() else None


def slimmable(model: nn.Module, ratios: str = DEFAULT_RATIOS) -> SlimmableViT:
    """A timm model that is in memory already, at every width; it keeps its weights, and shares them.

    Args:
        ratios: the widths, "0.25,0.5,0.75,1".

    Raises:
        CheckpointError: a model that cannot be sliced, or that timm does not build again from what it shows.
        PointError: a width that does not divide its channels.
    """
    vit, spec, points = refuse_unless_plain(model), read_off(model), parse_points(ratios)
    for point in points:
        spec.at(point)
    again = spec.build_with(vit.state_dict(), f"this {spec.architecture}")
    probe, was_training = random_images(spec, 2).to(next(vit.parameters())), vit.training
    with torch.no_grad():
        same = torch.equal(again(probe), vit.eval()(probe))
    vit.train(was_training)
    if not same:
        raise CheckpointError(
            f"timm's {spec.architecture} computes something else than this model.",
            "Save it with what it was created with, and load that: "
            "timm.models.save_for_hf(model, DIR, model_args=...); scala convert DIR",
        )
    return SlimmableViT(vit, spec, Rule(points, spec.num_heads)).train(was_training)


def open_family(
    foreign: Foreign, file: str, points: Sequence[Point] | None, changes: Changes, layout: Layout
) -> tuple[SlimmableViT, Record]:
    """A checkpoint of the Scala authors' release, which is a trained family of widths already."""
    if changes.given() or layout == "fused":
        raise CheckpointError(
            f"{file} is a family of widths by Scala's authors; it is converted as it is.",
            "Leave out --num-classes, --img-size, --patch-size and --layout.",
        )
    net = open_theirs(foreign, file)
    for point in points or ():
        find_point(point, net.points)
    origin = {"model": foreign.named, "weights": Path(file).name}
    return net.with_points(points or net.points).eval(), Record(
        method="scala", order="none", provenance=origin
    )


def open_slimmable(name: str, ratios: str | None, scratch: bool = False) -> tuple[SlimmableViT, Record]:
    """A slimmable checkpoint as it is, or with other widths; any other MODEL converted on the fly.

    Args:
        ratios: "0.25,0.5,..."; None keeps a checkpoint's own, and gives a MODEL the default ones.
        scratch: a MODEL gets random weights.
    """
    if is_checkpoint(name):
        net, record = load_with_record(resolve(name))
        return (net.with_points(parse_points(ratios)) if ratios else net), record
    return open_model(name, parse_points(ratios) if ratios else None, scratch=scratch)


def is_checkpoint(name: str) -> bool:
    """Whether a name stands for a slimmable checkpoint; an alias never does, a slice is an ordinary model."""
    about = about_of(name)
    return bool(about) and "sliced_from" not in about


def about_of(name: str) -> dict[str, Any]:
    """What the checkpoint, or the slice, of that name tells of itself; nothing of anything else."""
    if name in ALIASES:
        return {}
    try:
        hub = name.startswith("hf-hub:")
        directory = fetch(name.removeprefix("hf-hub:"), [CONFIG]) if hub else resolve(name)
        about = read_config(directory).get("scala")
    except CheckpointError:
        return {}
    return about if isinstance(about, dict) else {}


def locate(model: str) -> tuple[str, dict[str, Any]]:
    """timm's name for MODEL, and the arguments stored with it. Raises CheckpointError if timm has none."""
    if not model:
        raise CheckpointError(
            "the weight file does not say which architecture it holds.",
            "Name it: scala convert deit_s --weights FILE",
        )
    if model not in ALIASES and (Path(model).expanduser() / CONFIG).is_file():
        model = f"local-dir:{model}"
    if model.startswith("local-dir:"):
        directory = Path(model.removeprefix("local-dir:")).expanduser()
        if not (directory / CONFIG).is_file():
            raise no_model(directory)
        return f"local-dir:{directory}", args_of(directory)
    if model.startswith("hf-hub:"):
        return model, args_of(fetch(model.removeprefix("hf-hub:"), [CONFIG]))
    path = Path(model).expanduser()
    if model not in ALIASES and ("/" in model or path.is_dir() or path.suffix in WEIGHT_FILES):
        raise no_model(path)
    name = ALIASES.get(model, model)
    if not timm.is_model(name.partition(".")[0]):
        close = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
        raise CheckpointError(
            f"there is no model {model!r}.",
            f"Did you mean {', '.join(close)}?"
            if close
            else f"Try one of {', '.join(ALIASES)}, or a timm name.",
        )
    return name, {}


def args_of(directory: Path) -> dict[str, Any]:
    """The arguments timm stored with a model; none where it needed none."""
    return dict(read_config(directory).get("model_args") or {})


def no_model(path: Path) -> CheckpointError:
    """The error for a path at which no model lies."""
    if (path / STATE).is_file():
        return CheckpointError(
            f"{path} is a training run.",
            f"Go on with it: scala finetune --resume {path}; cut it: scala slice {path}",
        )
    if path.is_dir():
        return CheckpointError(f"{path} has no config.json.", "Name a directory in timm's format.")
    if path.exists():
        return CheckpointError(f"{path} is a file, not a directory.", "Name it without local-dir:")
    return CheckpointError(
        f"{path} does not exist.", "Check the path; what lies on the Hub is hf-hub:org/name."
    )


def check_patches(spec: Spec) -> None:
    """Raises CheckpointError where the image is no multiple of the patch."""
    _, height, width = spec.input_size
    patch = spec.model_args["patch_size"]
    if isinstance(patch, int) and (height % patch or width % patch):
        raise CheckpointError(
            f"image size {height} is not a multiple of patch size {patch}.",
            f"Try --img-size {max(height // patch, 1) * patch}, or another --patch-size.",
        )


def create(
    name: str, args: Mapping[str, Any], foreign: Foreign | None = None, pretrained: bool = False
) -> VisionTransformer:
    """timm's model: on somebody's state dict, with the pretrained weights of its name, or random.

    timm resamples position and patch embeddings that differ. Somebody's weights must fit in all else, then
    their head gives way to one of the wanted number of classes.
    """
    kwargs: dict[str, Any] = dict(args)
    if foreign is not None:
        classes = len(foreign.state.get("head.weight", ()))  # features alone have none
        # else timm reads its own weights
        about: dict[str, Any] = {"num_classes": classes, "license": None, "source": ""}
        about |= {"label_names": foreign.cfg.get("label_names"), "state_dict": dict(foreign.state)}
        kwargs["pretrained_cfg_overlay"] = {**foreign.cfg, **about}
        kwargs["num_classes"] = classes  # else timm would let anything pass that differs
    elif pretrained and name.startswith("local-dir:"):
        read_weights(Path(name.removeprefix("local-dir:")) / WEIGHTS)
    elif pretrained and not name.startswith("hf-hub:"):
        if not timm.is_model_pretrained(name):
            raise CheckpointError(f"timm has no pretrained weights for {name}.", NO_WEIGHTS)
        fail_fast_offline()
    try:
        vit = refuse_unless_plain(timm.create_model(name, pretrained=pretrained, **kwargs))
        wanted = args.get("num_classes", vit.num_classes)
        if wanted != vit.num_classes:
            vit.reset_classifier(wanted)
        return vit
    except (OSError, TRANSPORT) as error:
        raise unreachable(name, error) from None
    except (RuntimeError, LookupError, AssertionError, AttributeError, TypeError, ValueError) as error:
        key = re.search(r'(?:Missing|Unexpected) key[^"]*"[^"]+"|size mismatch for [^.]+[^,]+', str(error))
        reason = key[0] if key else " ".join(str(error).split())
        raise CheckpointError(
            f"cannot build {name}: {reason}.",
            "Name the architecture and sizes the weights were trained with.",
        ) from None
