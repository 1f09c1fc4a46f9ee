"""Registers architectures with timm: ViTs with fewer tokens, and LV-ViT.

This happens while other modules of this package are still being imported, so the functions import those when
called.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)

if TYPE_CHECKING:
    from scala_cli.slicing.tokens import Reduction

import_module("scala_cli.models.lvvit")  # registers LV-ViT; imports nothing of this package

__all__ = ["scala_vit", "slimmed_vit"]


@register_model
def scala_vit(
    pretrained: bool = False,
    base: str = "vit_small_patch16_224",
    keep: float = 1.0,
    tokens: "Reduction" = "drop",
    blocks: tuple[int, ...] = (),
    **args: Any,
) -> VisionTransformer:
    """Builds timm's ViT `base` with fewer tokens.

    Args:
        keep: share of the tokens that each dropping block passes on.
        tokens, blocks: how tokens are reduced, as in `TokenRule`.
        args: arguments of `base`.
    """
    from scala_cli.models.block import MergeBlock, SlimBlock, pass_on
    from scala_cli.slicing.point import Point
    from scala_cli.slicing.tokens import TokenRule

    block = MergeBlock if tokens == "merge" else SlimBlock
    vit = model_entrypoint(base)(pretrained=pretrained, block_fn=block, **args)
    if keep < 1:
        pass_on(vit, TokenRule(tokens, tuple(blocks)), Point.of(f"1~{keep!r}").keep)
    return vit


@register_model
def slimmed_vit(
    pretrained: bool = False,
    base: str = "deit_small_patch16_224",
    tsm: Mapping[str, int] | None = None,
    stages: Sequence[int] = (3, 3, 3, 3),
    keep: float = 0.5,
    **args: Any,
) -> VisionTransformer:
    """Builds timm's ViT `base` with token slimming modules (models/slimmed.py).

    Args:
        tsm: block number -> how many patch tokens it passes on.
        stages, keep: used without `tsm`, as in `slim_counts`.
        args: arguments of `base`.
    """
    from scala_cli.models.slimmed import build

    if not args.get("pretrained_cfg"):
        args["pretrained_cfg"] = get_pretrained_cfg(base)
    return build_model_with_cfg(
        partial(build, base, tsm, stages, keep),  # called like a class
        "slimmed_vit",
        pretrained,
        pretrained_strict=args.pop("pretrained_strict", True),
        **args,
    )


PAPER = {
    "sit_t": ("lvvit_t", (1, 1, 1, 11)),
    "sit_xs": ("lvvit_s", (1, 1, 1, 13)),
    "sit_s": ("lvvit_s", (9, 3, 2, 2)),
    "sit_m": ("lvvit_m", (10, 4, 3, 3)),
    "sit_l": ("lvvit_l", (10, 4, 3, 7)),
}
"""SiT's models (arXiv 2111.12624, table 8): name -> the model that is slimmed, and its stages."""


def entry(name: str) -> Callable[..., VisionTransformer]:
    """Returns the function that timm calls to build SiT's model `name`."""
    base, stages = PAPER[name]

    def build(pretrained: bool = False, **args: Any) -> VisionTransformer:
        return slimmed_vit(pretrained, **{"base": base, "stages": stages, **args})

    build.__name__ = name
    return build


for each in PAPER:
    register_model(entry(each))
