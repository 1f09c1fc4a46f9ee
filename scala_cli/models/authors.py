"""Checkpoints of the Scala authors' own release (arXiv 2412.04786), in timm's terms.

Their model has timm's parameters and another arithmetic, in four ways. The fused qkv weight is cut as one
block, and the attention scale is the full width's: both are settings of our rule. Which end a width keeps is
another matter in the distilled model. And every layer norm is called with eps 1e-5, where timm's DeiT has
1e-6: that becomes a scale of the residual stream.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import timm

from scala_cli.errors import CheckpointError
from scala_cli.models.foreign import Foreign
from scala_cli.models.skeleton import without_weights
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.stream import with_eps
from scala_cli.models.vit import Spec, describe, refuse_misfit
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import Rule

NAME = re.compile(r"deit_(so_tiny|tiny|small|base)(_distilled)?_patch16_224_scala")
EPS = 1e-5
DISTILLED_ENDS = Point.of("0.25"), Point.of("1")
"""In the distilled model these widths keep the first channels, whichever were trained."""


def is_theirs(content: Foreign) -> bool:
    return NAME.fullmatch(content.named) is not None


def open_theirs(content: Foreign, origin: str) -> SlimmableViT:
    """The slimmable model that computes what theirs does, at every width that was trained.

    Args:
        origin: the file, for messages.

    Raises:
        CheckpointError: for the first key that does not fit, or where the widths are not told.
    """
    spec = spec_of(content)
    points = trained_points(content.options, origin)
    for point in points:
        spec.at(point)
    bounds = DISTILLED_ENDS if "_distilled" in content.named else None
    rule = Rule(points, spec.num_heads, isolated=True, layout="fused", attn_scale="fixed", bounds=bounds)
    refuse_misfit(spec.build(), content.state, origin)
    return SlimmableViT(spec.build_with(with_eps(content.state, spec, EPS)), spec, rule)


def spec_of(content: Foreign) -> Spec:
    """timm's own DeiT of that name; so_tiny is half the width of tiny."""
    size, distilled = NAME.fullmatch(content.named).groups(default="")  # type: ignore[union-attr]
    args: dict[str, Any] = {"embed_dim": 96, "num_heads": 3} if size == "so_tiny" else {}
    if "head.bias" in content.state:
        args["num_classes"] = len(content.state["head.bias"])
    with without_weights():
        vit = timm.create_model(f"deit_{size.removeprefix('so_')}{distilled}_patch16_224", **args)
    return describe(vit, args)


def trained_points(options: Mapping[str, Any], origin: str) -> tuple[Point, ...]:
    """The widths from `smallest_ratio` to `largest_ratio` in steps of `granularity`."""
    try:
        smallest, largest, step = (
            Fraction(options[name]).limit_denominator(1 << 14)
            for name in ("smallest_ratio", "largest_ratio", "granularity")
        )
        count = (largest - smallest) / step
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise CheckpointError(
            f"{origin} does not tell its widths: smallest_ratio, largest_ratio and granularity in its args.",
            "Take the file that the training script saved, not one with the weights alone.",
        ) from None
    return tuple(Point(smallest + number * step) for number in range(math.floor(count) + 1))
