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
    return NAME.fullmatch(source.config.architecture) is not None


def open_scala(source: Source, origin: str) -> tuple[SlimmableViT, VisionTransformer]:
    """The slimmable model that computes what theirs does, at every width that was trained.

    Beside it what theirs computes at full width: timm's model on the weights as they came, with their eps.

    Args:
        origin: the file, for messages.

    Raises:
        CheckpointError: for the first key that does not fit, or where the widths are not told.
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
    theirs = norms_with_eps(spec.build_with(state), EPS)
    return SlimmableViT(spec.build_with(with_eps(state, spec, EPS)), spec, rule), theirs


def spec_of_name(named: str, state: Mapping[str, Tensor]) -> Spec:
    """timm's own DeiT of that name; so_tiny is half the width of tiny."""
    size, distilled = NAME.fullmatch(named).groups(default="")  # type: ignore[union-attr]
    args: dict[str, Any] = {"embed_dim": 96, "num_heads": 3} if size == "so_tiny" else {}
    if "head.bias" in state:
        args["num_classes"] = len(state["head.bias"])
    return describe(skeleton(f"deit_{size.removeprefix('so_')}{distilled}_patch16_224", **args), args)


def trained_ratios(options: Mapping[str, Any], origin: str) -> tuple[Fraction, ...]:
    """The widths from `smallest_ratio` to `largest_ratio` in steps of `granularity`.

    Raises CheckpointError where they are missing, or no widths.
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
