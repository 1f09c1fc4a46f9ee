"""What is timed: the widths of a family, models to compare them with, and the runtimes that run them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from scala_cli.errors import CheckpointError, ScalaError, naming_failure
from scala_cli.formats import FORMATS, format_named
from scala_cli.measure import cost_of
from scala_cli.models.locate import short_name
from scala_cli.models.skeleton import without_weights
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import locate
from scala_cli.slicing.point import Point

TORCH = ("torch", "compile")
"""Runtimes that take the model as it is; all others take a file."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be timed.

    Args:
        name: timm's.
        point: the width; None for a model that is only compared with.
        costs: {"params", "gmacs"}
        build: the model on the CPU, in evaluation mode; told so, as exporters want it.
    """

    name: str
    point: Point | None
    input_size: tuple[int, ...]
    costs: Mapping[str, Any]
    build: Callable[[bool], nn.Module]


def points_of(net: SlimmableViT, points: Sequence[Point]) -> list[Subject]:
    size = net.spec.input_size
    return [
        Subject(
            net.spec.architecture,
            point,
            size,
            cost_of(net.spec.at(point).build(), size),
            partial(net.slice, point),
        )
        for point in points
    ]


def other(asked: str) -> Subject:
    """A timm model with random weights. Raises CheckpointError where timm has none of that name."""
    name, args = locate(asked)

    def build(_: bool) -> Any:
        return timm.create_model(name, **args).eval()

    with naming_failure(f"{asked} cannot be compared with", "Name another.", CheckpointError):
        with without_weights():
            skeleton = build(False)
        size = tuple(skeleton.pretrained_cfg["input_size"])
        costs = cost_of(skeleton, size)
    return Subject(short_name(asked), None, size, costs, build)


def refuse_runtimes(runtimes: Sequence[str], device: torch.device, bfloat16: bool) -> None:
    """Raises ScalaError for a runtime that does not exist here, or does not run as asked."""
    known = f"Runtimes are {', '.join([*TORCH, *FORMATS])}."
    if not runtimes:
        raise ScalaError("no runtime is given.", known)
    for name in [name for name in runtimes if name not in TORCH]:
        if name not in FORMATS:
            raise ScalaError(f"there is no runtime {name!r}.", known)
        if format_named(name).open_bfloat16 is None and bfloat16:
            raise ScalaError(f"{name} does not compute in bfloat16.", "Leave out --amp, or that runtime.")
        if device.type != "cpu":
            raise ScalaError(f"{name} is timed on the CPU only.", "Give --device cpu.")
