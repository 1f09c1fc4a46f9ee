"""Converts checkpoints released by the Scala authors (arXiv 2412.04786) to timm's DeiT.

Their model has timm's parameters but computes differently in four ways. It cuts the fused qkv weight as one
block and uses the full width's attention scale at every width; both are settings of `Rule`. In the distilled
model other widths keep the first channels (`DISTILLED_ENDS`). Every layer norm has eps 1e-5, timm's DeiT
1e-6; the residual stream is scaled to make up for that.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.foreign import Source
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.stream import norms_with_eps, with_eps
from scala_cli.models.vit import Spec, describe, refuse_misfit, skeleton
from scala_cli.slicing.rule import Rule

NAME = re.compile(r"deit_(so_tiny|tiny|small|base)(_distilled)?_patch16_224_scala")
EPS = 1e-5
DISTILLED_ENDS = Fraction(1, 4), Fraction(1)
"""In the distilled model these widths keep the first channels, whichever were trained."""


def is_scala(source: Source) -> bool:
    """Whether a weight file names an architecture of the Scala release."""
    return NAME.fullmatch(source.config.architecture) is not None


def open_scala(source: Source, origin: str) -> tuple[SlimmableViT, VisionTransformer]:
    """Returns a slimmable model equal to the released one at every trained width, and its original.

    The original is timm's full-width model on the unchanged weights, with the release's eps.

    Args:
        origin: the file, for messages.

    Raises:
        CheckpointError: for the first key that does not fit, or if the file does not name its widths.
    """
    assert source.weights is not None
    named, state = source.config.architecture, source.weights()
    spec = spec_of_name(named, state)
    ratios = trained_ratios(source.options, origin)
    for ratio in ratios:
        spec.at(ratio)
    bounds = DISTILLED_ENDS if "_distilled" in named else None
    rule = Rule(ratios, spec.num_heads, isolated=True, layout="fused", attn_scale="fixed", bounds=bounds)
    refuse_misfit(spec.build(), state, origin)
    original = norms_with_eps(spec.build_with(state), EPS)
    return SlimmableViT(spec.build_with(with_eps(state, spec, EPS)), spec, rule), original


def spec_of_name(named: str, state: Mapping[str, Tensor]) -> Spec:
    """Returns the Spec of timm's DeiT of that name; so_tiny is half as wide as tiny."""
    size, distilled = NAME.fullmatch(named).groups(default="")  # type: ignore[union-attr]
    args: dict[str, Any] = {"embed_dim": 96, "num_heads": 3} if size == "so_tiny" else {}
    if "head.bias" in state:
        args["num_classes"] = len(state["head.bias"])
    return describe(skeleton(f"deit_{size.removeprefix('so_')}{distilled}_patch16_224", **args), args)


def trained_ratios(options: Mapping[str, Any], origin: str) -> tuple[Fraction, ...]:
    """Returns the widths from `smallest_ratio` to `largest_ratio` in steps of `granularity`.

    Raises CheckpointError if these options are missing or invalid.
    """
    try:
        smallest, largest, step = (
            Fraction(float(options[name])).limit_denominator(1 << 14)
            for name in ("smallest_ratio", "largest_ratio", "granularity")
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(
            f"{origin} does not tell its widths: smallest_ratio, largest_ratio and granularity in its args.",
            "Take the file that the training script saved, not one with the weights alone.",
        ) from None
    if not (0 < smallest <= largest <= 1 and step > 0):
        raise CheckpointError(
            f"{origin} tells widths that cannot be: from {smallest} to {largest} in steps of {step}.",
            "Take the file that the training script saved.",
        )
    count = math.floor((largest - smallest) / step)
    return tuple(smallest + number * step for number in range(count + 1))
