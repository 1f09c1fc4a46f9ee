"""The architecture that timm knows only once `scala_cli` is imported: a ViT that passes on fewer tokens.

It is registered while other modules of this package are still being imported, so it imports them when called.
"""

from typing import TYPE_CHECKING, Any

from timm.models import VisionTransformer, model_entrypoint, register_model

if TYPE_CHECKING:
    from scala_cli.slicing.tokens import Reduction

__all__ = ["scala_vit"]


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
