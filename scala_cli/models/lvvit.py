"""LV-ViT (arXiv 2104.10858): timm's VisionTransformer with a stem of convolutions as patch embedding.

Two other differences are folded into the weights (models/lvvit_files.py): the constant that divides each
branch into the last layer of the branch, and each BatchNorm into the convolution before it. Importing this
module registers the architectures with timm.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import LayerNorm, PatchEmbed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

GELU, RELU = nn.GELU, nn.ReLU
STEMS: dict[str, tuple[type[nn.Module], tuple[tuple[int, int, int], ...]]] = {
    "4c": (GELU, ((8, 3, 2), (4, 3, 2), (2, 3, 2), (1, 3, 2))),
    "6c": (GELU, ((8, 3, 2), (8, 3, 1), (8, 3, 1), (4, 3, 2), (2, 3, 2), (1, 3, 2))),
    "4_2": (RELU, ((1, 7, 2), (1, 3, 1), (1, 3, 1), (1, 8, 8))),
}
"""Each stem's activation and convolutions (d, kernel, stride). A convolution has the stem's width / d
channels, the last one those of the model. `4_2` is from LV-ViT's authors, the others from SiT's."""


class StemConv(nn.Conv2d):
    """The last convolution of a stem, which runs the others first; it replaces timm's single convolution.

    Args:
        channels: of the image.
        embed_dim: channels of the patch tokens; a slice has fewer.
        kind: a name of STEMS.
        width: the stem's width, the same in every slice; the other convolutions have a share of it.
    """

    def __init__(
        self, channels: int, embed_dim: int, kind: str, width: int, bias: bool, **where: Any
    ) -> None:
        activation, (*first, (_, kernel, stride)) = STEMS[kind]
        made: list[nn.Module] = []
        given = channels
        for share, size, step in first:
            made += [
                nn.Conv2d(given, width // share, size, step, padding_of(size, step), **where),
                activation(),
            ]
            given = width // share
        super().__init__(given, embed_dim, kernel, stride, padding_of(kernel, stride), bias=bias, **where)
        self.kind, self.width, self.channels = kind, width, channels
        self.before = nn.Sequential(*made)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, embed_dim, H / patch, W / patch)."""
        return super().forward(self.before(images))


def padding_of(kernel: int, stride: int) -> int:
    """Returns the padding with which a convolution divides the size by its stride."""
    return 0 if kernel == stride else kernel // 2


def stem_embed(
    stem: str, stem_width: int, in_chans: int, embed_dim: int, bias: bool, **more: Any
) -> PatchEmbed:
    """Returns timm's patch embedding with a stem in place of its convolution."""
    embed = PatchEmbed(in_chans=in_chans, embed_dim=embed_dim, bias=bias, **more)
    where = {name: more.get(name) for name in ("device", "dtype")}
    embed.proj = StemConv(in_chans, embed_dim, stem, stem_width, bias, **where)
    return embed


def stem_args(vit: Any) -> dict[str, Any]:
    """Returns the stem arguments of a model of this file; {} for any other model."""
    proj = vit.patch_embed.proj
    return {"stem": proj.kind, "stem_width": proj.width} if isinstance(proj, StemConv) else {}


def image_channels(vit: Any) -> int:
    """Returns the number of image channels that a model takes."""
    proj = vit.patch_embed.proj
    return proj.channels if isinstance(proj, StemConv) else proj.in_channels


def lvvit(name: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> VisionTransformer:
    """Builds an LV-ViT.

    Args:
        sizes: its arguments of timm's VisionTransformer, with `stem` and `stem_width`.
        given: arguments that override `sizes`, for example for a narrower or shallower model.
    """
    args = {"mlp_ratio": 3, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5), **sizes, **given}
    stem, width = args.pop("stem"), args.pop("stem_width")
    if stem:
        args["embed_layer"] = partial(stem_embed, stem, width)
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=args.pop("pretrained_strict", True),
        feature_cfg={"out_indices": args.pop("out_indices", 3), "feature_cls": "getter"},
        **args,
    )


def sizes(dim: int, depth: int, heads: int, stem: str = "4c") -> dict[str, Any]:
    """Returns timm's arguments for an LV-ViT of this size."""
    return {"embed_dim": dim, "depth": depth, "num_heads": heads, "stem": stem, "stem_width": dim}


SIZES = {
    "lvvit_t": sizes(320, 14, 5),
    "lvvit_s": sizes(384, 16, 6),
    "lvvit_m": sizes(512, 20, 8),
    "lvvit_l": {**sizes(768, 24, 12, "6c"), "img_size": 288},
}
"""The models that SiT's authors slim (arXiv 2111.12624, table 8)."""
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, size.get("img_size", 224), size.get("img_size", 224)),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj.before.0",
            "classifier": "head",
        }
        for name, size in SIZES.items()
    }
)


def entry(name: str) -> Callable[..., VisionTransformer]:
    """Returns the function that timm calls to build the model `name`."""

    def build(pretrained: bool = False, **given: Any) -> VisionTransformer:
        return lvvit(name, pretrained, SIZES[name], given)

    build.__name__ = name
    return build


for each in SIZES:
    register_model(entry(each))
