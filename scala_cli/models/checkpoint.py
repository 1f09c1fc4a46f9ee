"""The checkpoint directory: timm's config.json and model.safetensors, plus what a slimmable ViT needs.

This package adds one top-level "scala" object to config.json, and extra.st if there are tensors
that timm has no place for. timm ignores both, so the full model and every slice load with
`timm.create_model("local-dir:DIR", pretrained=True)`.

The object may get new fields: readers ignore unknown fields and use defaults for missing ones. The format
number rises only if ignoring a new field would give a wrong model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

import scala_cli
from scala_cli.errors import CheckpointError, PointError
from scala_cli.files import whole_directory
from scala_cli.models.config import REDUCED, spec_of
from scala_cli.models.locate import CONFIG, EXTRA, WEIGHTS, read_config, resolve
from scala_cli.models.resize import Resize
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.slimmed import apart
from scala_cli.models.vit import Spec
from scala_cli.slicing.point import Point, decimal, parse_points, ratios_of, sized, widths_of
from scala_cli.slicing.rule import AttnScale, Rule
from scala_cli.slicing.table import Layout
from scala_cli.slicing.tokens import Reduction, TokenRule

FORMAT, SLIMMED_FORMAT = 1, 2
"""SLIMMED_FORMAT has token slimming modules; without them the weights would be a different model."""


@dataclass(frozen=True)
class Record:
    """What a checkpoint records beside its weights.

    Args:
        trained: whether the weights are pretrained or trained, not random.
        method: the training method, or None if this package has not trained the model.
        order: how the channels were ordered: by "importance" or "none"; None if not decided yet.
        metrics: for each trained point its columns and those of the task: {"ratio", "top1", "top5"}, in
            percent; None for what is not defined.
        provenance: where the weights came from, and the versions that wrote them.
        new_head: whether only the head is random and all other weights are trained.
        task: what the model is for, a name of `tasks.TASKS`.
        calibrated: number of images without labels that the widths were fitted to; 0 if they were not.
    """

    trained: bool = True
    method: str | None = None
    order: str | None = None
    metrics: Sequence[Mapping[str, float | None]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    new_head: bool = False
    task: str = "classification"
    calibrated: int = 0

    def untrained(self, points: Sequence[Point]) -> str:
        """Returns a warning about weights that have not been trained, or ""."""
        if not self.trained:
            return "the weights are random"
        if self.new_head:
            return "the head is new and has not been trained"
        narrow = [point for point in points if point.ratio < 1]
        if self.method is not None or not narrow:
            return ""
        have = f"width {narrow[0]} has" if len(narrow) == 1 else "the narrower widths have"
        instead = ", only reordered" if self.order == "importance" else ""
        if self.calibrated:
            instead = f", only fitted to the full model on {self.calibrated} images without labels"
        return f"{have} not been trained{instead}"

    def is_untrained(self, points: Sequence[Point]) -> bool:
        """Whether only the full width has been trained, and some of these points are narrower."""
        narrow = any(point.ratio < 1 for point in points)
        return self.trained and not self.new_head and self.method is None and narrow

    def order_is_free(self, rule: Rule) -> bool:
        """Whether the channels may still be ordered: only the full width is trained, no order is decided."""
        return self.widths_are_free(rule) and self.order is None

    def widths_are_free(self, rule: Rule) -> bool:
        """Whether the narrower widths may still be fitted: only the full width is trained, in any order."""
        narrow = any(Point.of_row(metric).ratio < 1 for metric in self.metrics)
        return self.trained and not narrow and self.order != "none" and rule.layout == "aligned"

    def measured(self, point: Point, column: str) -> float | None:
        """Returns a metric of a point as measured in training; None if unknown."""
        return next((m.get(column) for m in self.metrics if Point.of_row(m) == point), None)

    def as_json(self) -> dict[str, Any]:
        """Returns the record's fields for config.json; those added later only if not at their defaults."""
        later = {"task": Record.task, "calibrated": Record.calibrated}
        return {name: value for name, value in vars(self).items() if later.get(name, self) != value}


def versions() -> dict[str, str]:
    """Returns the versions of this package, timm and torch."""
    return {"scala-vit": scala_cli.__version__, "timm": version("timm"), "torch": version("torch")}


def save(net: SlimmableViT, record: Record, directory: Path) -> None:
    """Writes a checkpoint directory with the full-width model, atomically, replacing an existing one."""
    rule = net.rule
    about = {
        "format": SLIMMED_FORMAT if net.spec.tsm else FORMAT,
        **record.as_json(),
        "ratios": [*map(decimal, rule.ratios)],
        "isolated": rule.isolated,
        "bounds": [*map(decimal, rule.bounds)] if rule.bounds else None,
        "layout": rule.layout,
        "attn_scale": rule.attn_scale,
        **family_fields(net),
        "dims": {decimal(ratio): dims(net.spec.at(ratio)) for ratio in rule.ratios},
        "provenance": {**record.provenance, "versions": versions()},
        **({"tsm": dict(net.spec.tsm)} if net.spec.tsm else {}),
    }
    plain, slim = apart(net.vit.state_dict())
    extra = {**net.extra, **slim}
    with whole_directory(directory) as fresh:
        write_timm(plain, replace(net.spec, tsm={}), about, fresh)
        if extra:
            save_file({name: t.detach().contiguous() for name, t in extra.items()}, fresh / EXTRA)


def family_fields(net: SlimmableViT) -> dict[str, Any]:
    """Returns the config.json fields of a family with several sizes or shares of tokens; else {}."""
    about: dict[str, Any] = {}
    if net.points != tuple(map(Point, net.rule.ratios)):
        about["points"] = [*map(str, net.points)]
    if net.spec.tokens != TokenRule() or any(point.keep < 1 for point in net.points):
        places = net.spec.tokens.places(len(net.vit.blocks))
        about["tokens"] = {"kind": net.spec.tokens.kind, "blocks": [*places]}
    if net.spec.resize != Spec.resize:
        about["resize"] = net.spec.resize
    return about


def write_timm(state: Mapping[str, Tensor], spec: Spec, about: Mapping[str, Any], directory: Path) -> None:
    """Writes the two files timm reads, with `about` as the "scala" object of config.json."""
    config: dict[str, Any] = {"scala": {**about, "features": True} if spec.features else about}
    if spec.label_names:
        config["label_names"] = list(spec.label_names)
    stock: Any = spec.build_with(state)  # without the blocks and settings of training
    args = dict(spec.model_args)
    if spec.tsm:
        stock.pretrained_cfg = {**stock.pretrained_cfg, "architecture": "slimmed_vit"}
        args |= {"base": spec.architecture, "tsm": dict(spec.tsm)}
    if spec.keep < 1:
        stock.pretrained_cfg = {**stock.pretrained_cfg, "architecture": REDUCED}
        args |= {"base": spec.architecture, "keep": float(spec.keep), "tokens": spec.tokens.kind}
        args |= {"blocks": [*spec.tokens.places(len(stock.blocks))]}
    save_for_hf(stock, str(directory), config, model_args=args, safe_serialization=True)


def dims(spec: Spec) -> dict[str, int]:
    """Returns the widths of a model, for a checkpoint's config.json."""
    return {"embed_dim": spec.embed_dim, "num_heads": spec.num_heads, "hidden_dim": spec.hidden_dim}


def load(checkpoint: str | Path | None = None) -> SlimmableViT:
    """Returns the slimmable model of a checkpoint directory, a run, `hf-hub:org/repo`, or the newest run.

    It is in evaluation mode. The weights are memory-mapped, not copied. Raises CheckpointError.
    """
    return load_with_record(resolve(checkpoint))[0]


class About(NamedTuple):
    """The contents of a checkpoint's config.json."""

    spec: Spec
    rule: Rule
    record: Record
    points: tuple[Point, ...]


def load_with_record(directory: Path) -> tuple[SlimmableViT, Record]:
    """Returns the model and the record of a checkpoint directory (as from `resolve`)."""
    spec, rule, record, points = read_about(directory)
    file, (extra, slim) = directory / WEIGHTS, apart(read_extra(directory))
    vit = spec.build_with({**read_weights(file), **slim}, origin=file)
    return SlimmableViT(vit, spec, rule, extra, points).eval(), record


def read_about(directory: Path) -> About:
    """Reads config.json. Raises CheckpointError unless it belongs to a slimmable checkpoint."""
    config = read_config(directory)
    about = config.get("scala")
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{directory} is a timm checkpoint, not yet a slimmable one.",
            remedy="convert_first",
            model=f"local-dir:{directory}",
        )
    if "sliced_from" in about:
        raise CheckpointError(
            f"{directory} is a slice: it holds one width only.",
            f"Load it with timm.create_model('local-dir:{directory}', pretrained=True), "
            "or name the family that it was cut from.",
        )
    if about.get("format") not in (FORMAT, SLIMMED_FORMAT):
        raise CheckpointError(
            f"{directory} has checkpoint format {about.get('format')}; this version reads {SLIMMED_FORMAT}.",
            "Upgrade: pip install -U scala-vit",
        )
    spec = spec_of(config, directory / CONFIG)
    try:
        spec = replace(spec, tsm={int(number): int(count) for number, count in about.get("tsm", {}).items()})
        rule = read_rule(about, spec)
        spec, points = read_points(about, spec, rule)
        record = read_record(about)
        if spec.features and "task" not in about:
            record = replace(record, task="features")
    except KeyError as missing:
        raise CheckpointError(f"{directory / CONFIG} lacks {missing}.", "Convert it again.") from None
    except (TypeError, ValueError, AttributeError, PointError) as error:
        said = str(error).rstrip(".")
        raise CheckpointError(f"{directory / CONFIG} is damaged: {said}.", "Convert it again.") from None
    return About(spec, rule, record, points)


def read_points(about: Mapping[str, Any], spec: Spec, rule: Rule) -> tuple[Spec, tuple[Point, ...]]:
    """Returns the spec with its token rule and resize method, and the family's points.

    Raises as `read_rule`.
    """
    points = tuple(map(Point, rule.ratios))
    if "points" in about:
        points = sized(parse_points(",".join(about["points"])), spec.size)
    if not {*widths_of(points)} <= {*rule.ratios}:
        raise ValueError("points of widths that it does not have")
    rule_of_tokens = about.get("tokens", {})
    blocks = tuple(map(int, rule_of_tokens.get("blocks", ())))
    tokens = TokenRule(rule_of_tokens.get("kind", TokenRule.kind), blocks)
    resize = about.get("resize", Spec.resize)
    if tokens.kind not in get_args(Reduction) or resize not in get_args(Resize):
        raise ValueError(f"tokens {tokens.kind!r}, resize {resize!r}")
    return replace(spec, tokens=tokens, resize=resize), points


def read_record(about: Mapping[str, Any]) -> Record:
    """Returns the record in a "scala" object. Raises as `read_rule`."""
    values = {field.name: about[field.name] for field in fields(Record) if field.name in about}
    for name, kind in get_type_hints(Record).items():
        kind = {Sequence: list, Mapping: dict}.get(get_origin(kind), kind)
        if name in values and not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")
    record = Record(**values)
    for metric in record.metrics:
        Point.of_row(metric)
        for column, value in metric.items():
            if not isinstance(value, int | float | None):
                raise TypeError(f"{column} is {value!r} in metrics")
    options = record.provenance.get("options", [])
    if not (isinstance(options, list) and all(isinstance(word, str) for word in options)):
        raise TypeError(f"options is {options!r} in provenance")
    return record


def read_rule(about: Mapping[str, Any], spec: Spec) -> Rule:
    """Returns the slicing rule in a "scala" object.

    Raises KeyError, TypeError, ValueError or PointError if it is damaged.
    """
    chosen = {name: about[name] for name in ("isolated", "layout", "attn_scale") if name in about}
    rule = Rule(ratios_of(parse_points(",".join(about["ratios"]))), spec.num_heads, **chosen)
    if rule.layout not in get_args(Layout) or rule.attn_scale not in get_args(AttnScale):
        raise ValueError(f"layout {rule.layout!r}, attn_scale {rule.attn_scale!r}")
    if not isinstance(rule.isolated, bool):
        raise TypeError(f"isolated is {rule.isolated!r}")
    smallest, largest = about.get("bounds") or (None, None)
    if smallest is None or largest is None:
        return rule
    return replace(rule, bounds=(Point.of(smallest).ratio, Point.of(largest).ratio))


def read_weights(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, memory-mapped, not copied. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.", "Convert or download the checkpoint again.")
    try:
        return load_file(file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or is no safetensors file ({error}).", "Convert or download it again."
        ) from None


def read_extra(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint that timm has no place for. Raises CheckpointError."""
    file = directory / EXTRA
    return read_weights(file) if file.is_file() else {}


def copy_files(directory: Path, target: Path) -> None:
    """Copies the files of a checkpoint into another directory."""
    for name in (CONFIG, WEIGHTS, EXTRA):
        if (directory / name).is_file():
            copyfile(directory / name, target / name)


class TensorByTensor(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each mapped on access and freed with its last reference.

    So cutting a width never holds all full-width weights in memory.
    """

    def __init__(self, file: Path) -> None:
        read_weights(file)  # raises CheckpointError if any part of the file is damaged
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
