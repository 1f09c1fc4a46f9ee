"""The architectures that timm knows only once `scala_cli` is imported: with fewer tokens, and LV-ViT.

They are registered while other modules of this package are still being imported, so they import these when
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

import_module("scala_cli.models.lvvit")  # which needs nothing of this package and registers its own

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
    """timm's ViT `base` that reduces its tokens.

    Args:
        keep: share of the tokens that each dropping block passes on.
        tokens, blocks: how they are reduced, as `TokenRule`.
        args: those of `base`.
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
    """timm's ViT `base` with token slimming modules (models/slimmed.py).

    Args:
        tsm: how many patch tokens go on behind a block, by the block's number.
        stages, keep: instead of `tsm`, as `slim_counts`.
        args: those of `base`.
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
"""SiT's models (arXiv 2111.12624, table 8): what is slimmed, and its stages."""


def entry(name: str) -> Callable[..., VisionTransformer]:
    """Returns the function that timm calls to build SiT's model of that name."""
    base, stages = PAPER[name]

    def build(pretrained: bool = False, **args: Any) -> VisionTransformer:
        return slimmed_vit(pretrained, **{"base": base, "stages": stages, **args})

    build.__name__ = name
    return build


for each in PAPER:
    register_model(entry(each))
