"""The checkpoint directory: timm's config.json and model.safetensors, plus what a slimmable ViT needs.

Everything of ours is one top-level "scala" object in config.json, which timm ignores, so the full model
and every slice load with `timm.create_model("local-dir:DIR", pretrained=True)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor

import scala_cli
from scala_cli.errors import CheckpointError
from scala_cli.files import whole_directory
from scala_cli.models.config import spec_of
from scala_cli.models.locate import CONFIG, WEIGHTS, read_config, resolve
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import Spec
from scala_cli.slicing.point import Point, parse_points
from scala_cli.slicing.rule import AttnScale, Rule
from scala_cli.slicing.table import Layout

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What a checkpoint tells of itself beside its weights.

    Args:
        trained: whether its weights are pretrained or trained at all, or still random.
        method: the training method, or None before any.
        order: how the channels were put in order: by "importance", or "none"; None is not decided yet.
        metrics: per trained point {"ratio", "top1", "top5"}, in percent.
        provenance: where the weights came from, and the versions that wrote them.
        new_head: whether the head, alone of trained weights, is still random.
    """

    trained: bool = True
    method: str | None = None
    order: str | None = None
    metrics: Sequence[Mapping[str, float]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    new_head: bool = False

    def untrained(self, points: Sequence[Point]) -> str:
        """What is to be told of widths that no training has been through yet; "" of others."""
        if not self.trained:
            return "the weights are random"
        if self.new_head:
            return "the head is new and has not been trained"
        narrow = [point for point in points if point.ratio < 1]
        if self.method is not None or not narrow:
            return ""
        have = f"width {narrow[0]} has" if len(narrow) == 1 else "the narrower widths have"
        order = ", only put in order of importance" if self.order == "importance" else ""
        return f"{have} not been trained{order}"

    def top1(self, point: Point) -> float | None:
        return next((m["top1"] for m in self.metrics if Point.of(m["ratio"]) == point), None)


def versions() -> dict[str, str]:
    return {"scala-vit": scala_cli.__version__, "timm": version("timm"), "torch": version("torch")}


def save(net: SlimmableViT, record: Record, directory: Path) -> None:
    """Writes the full-width model as a checkpoint directory, atomically, replacing a former one."""
    rule = net.rule
    about = {
        "format": FORMAT,
        **vars(record),
        "ratios": [point.label for point in rule.points],
        "isolated": rule.isolated,
        "bounds": [point.label for point in rule.bounds] if rule.bounds else None,
        "layout": rule.layout,
        "attn_scale": rule.attn_scale,
        "dims": {point.label: dims(net.spec.at(point)) for point in rule.points},
        "provenance": {**record.provenance, "versions": versions()},
    }
    with whole_directory(directory) as fresh:
        write_timm(net.vit, net.spec, about, fresh)


def write_timm(vit: VisionTransformer, spec: Spec, about: Mapping[str, Any], directory: Path) -> None:
    """The two files timm reads, with `about` beside its own settings."""
    config: dict[str, Any] = {"scala": about}
    if spec.label_names:
        config["label_names"] = list(spec.label_names)
    vit.pretrained_cfg = dict(spec.pretrained_cfg)  # type: ignore[assignment]  # timm's own plain attribute
    save_for_hf(vit, str(directory), config, model_args=dict(spec.model_args), safe_serialization=True)


def dims(spec: Spec) -> dict[str, int]:
    return {"embed_dim": spec.embed_dim, "num_heads": spec.num_heads, "hidden_dim": spec.hidden_dim}


def load(checkpoint: str | Path | None = None) -> SlimmableViT:
    """The slimmable model of a checkpoint directory, a run, `hf-hub:org/repo`, or the newest run.

    In evaluation mode. The weights are mapped from the file, not copied. Raises CheckpointError.
    """
    return load_with_record(resolve(checkpoint))[0]


def load_with_record(directory: Path) -> tuple[SlimmableViT, Record]:
    """The model of a resolved checkpoint directory, and what its config.json records."""
    spec, rule, record = read_about(directory)
    file = directory / WEIGHTS
    net = SlimmableViT(spec.build_with(read_weights(file), origin=file), spec, rule)
    return net.eval(), record


def read_about(directory: Path) -> tuple[Spec, Rule, Record]:
    """All that config.json tells. Raises CheckpointError where it is not a slimmable checkpoint's."""
    config = read_config(directory)
    about = config.get("scala")
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{directory} is a timm checkpoint, not yet a slimmable one.",
            f"Convert it first: scala convert local-dir:{directory}",
        )
    if "sliced_from" in about:
        raise CheckpointError(
            f"{directory} is a slice: it holds one width only.",
            f"Load it with timm.create_model('local-dir:{directory}', pretrained=True), "
            "or name the family that it was cut from.",
        )
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has checkpoint format {about.get('format')}; this version reads {FORMAT}.",
            "Upgrade: pip install -U scala-vit",
        )
    spec = spec_of(config)
    try:
        if about["layout"] not in get_args(Layout) or about["attn_scale"] not in get_args(AttnScale):
            raise ValueError(f"layout {about['layout']!r}, attn_scale {about['attn_scale']!r}")
        rule = Rule(
            points=parse_points(",".join(about["ratios"])),
            num_heads=spec.num_heads,
            isolated=about["isolated"],
            layout=about["layout"],
            attn_scale=about["attn_scale"],
            bounds=tuple(map(Point.of, about["bounds"])) if about.get("bounds") else None,  # type: ignore
        )
        record = Record(**{name: about[name] for name in vars(Record())})
        for point in rule.points:
            record.top1(point)
    except KeyError as missing:
        raise CheckpointError(f"{directory / CONFIG} lacks {missing}.", "Convert it again.") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG} is damaged: {error}.", "Convert it again.") from None
    return spec, rule, record


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped, not copied. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.", "Convert or download the checkpoint again.")
    try:
        return load_file(file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or is no safetensors file ({error}).", "Convert or download it again."
        ) from None


class TensorByTensor(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each mapped by itself and let go with its last reference.

    Cutting one width from it keeps only that width in memory, not the full weights beside it.
    """

    def __init__(self, file: Path) -> None:
        read_weights(file)  # refuses a damaged file as a whole
        self.file = file
        with safe_open(file, "pt") as tensors:
            self.names = list(tensors.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
