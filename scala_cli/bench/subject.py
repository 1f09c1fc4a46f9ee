"""Subjects to time: the widths of a family, models to compare them with, and their runtimes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from scala_cli.cost import macs_of, params_of
from scala_cli.errors import CheckpointError, ScalaError, naming_failure
from scala_cli.formats import FORMATS, format_named
from scala_cli.models.locate import short_name
from scala_cli.models.named import config_of
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.slicing.point import Point

TORCH = ("torch", "compile")
"""Runtimes that take the model as it is; all others take a file."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be timed.

    Args:
        name: its name in timm.
        point: None for a compared model.
        params, macs: its number of parameters, and multiply-accumulates of one image.
        build: makes the model on the CPU, in evaluation mode; given True, of a fixed image size, as exporters
            need it.
    """

    name: str
    point: Point | None
    input_size: tuple[int, ...]
    params: int
    macs: int
    build: Callable[[bool], nn.Module]


def points_of(net: SlimmableViT, points: Sequence[Point]) -> list[Subject]:
    """Returns the points of a family as subjects to time."""
    subjects = []
    for point in points:
        spec = net.spec_at(point)
        skeleton, size = spec.build(), spec.input_size
        costs = params_of(skeleton), macs_of(skeleton, size)
        subjects.append(Subject(net.spec.architecture, point, size, *costs, partial(net.slice, point)))
    return subjects


def other(asked: str) -> Subject:
    """Returns a timm model with random weights. Raises CheckpointError if timm has none of this name."""
    config = config_of(asked)

    def build(_: bool) -> Any:
        return config.create().eval()

    with naming_failure(f"{asked} cannot be compared with", "Name another.", CheckpointError):
        skeleton = config.skeleton()
        # not every version of timm enters the model's arguments in its pretrained_cfg
        channels, *sides = skeleton.pretrained_cfg["input_size"]
        sides = config.model_args.get("img_size", sides)
        sides = [sides, sides] if isinstance(sides, int) else sides
        size = (config.model_args.get("in_chans", channels), *sides)
        costs = params_of(skeleton), macs_of(skeleton, size)
    return Subject(short_name(asked), None, size, *costs, build)


def refuse_runtimes(runtimes: Sequence[str], device: torch.device, bfloat16: bool) -> None:
    """Raises ScalaError for a runtime that is unknown, not installed, or not for this device or precision."""
    known = f"Runtimes are {', '.join([*TORCH, *FORMATS])}."
    if not runtimes:
        raise ScalaError("no runtime is given.", known)
    for name in [name for name in runtimes if name not in TORCH]:
        if name not in FORMATS:
            raise ScalaError(f"there is no runtime {name!r}.", known)
        if format_named(name).open_bfloat16 is None and bfloat16:
            raise ScalaError(
                f"{name} does not compute in bfloat16.",
                remedy="leave_out_one",
                setting="amp",
                other="that runtime",
            )
        if device.type != "cpu":
            raise ScalaError(f"{name} is timed on the CPU only.", remedy="try", setting="device", value="cpu")
