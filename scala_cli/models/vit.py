"""Describes, builds and checks timm's Vision Transformers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent, Mlp, PatchEmbed, SwiGLU, resample_abs_pos_embed
from timm.models import (
    VisionTransformer,
    VisionTransformerDistilled,
    filter_pretrained_cfg,
    is_model_in_modules,
)
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.block import MergeBlock, SlimBlock, pass_on
from scala_cli.models.lvvit import image_channels, stem_args
from scala_cli.models.resize import Resize
from scala_cli.models.slimmed import MODULE, SLIMMED_ARGS, SlimmedBlock, counts_of, put_behind
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import kept_count
from scala_cli.slicing.tokens import TokenRule

MODULES = ("deit", "vision_transformer", "vision_transformer_hybrid", "vitamin", "lvvit")
"""Modules of timm and this package whose architectures are of timm's class VisionTransformer."""


@dataclass(frozen=True)
class Spec:
    """Everything timm needs to rebuild a ViT, and the sizes that slicing narrows.

    Args:
        architecture: timm's name, without a tag.
        model_args: arguments for `timm.create_model`, JSON-able.
        pretrained_cfg: timm's input and label settings (mean, std, interpolation, label_names, ...).
        block: the class of its blocks.
        features: whether it outputs features instead of classes (models/features.py).
        tsm: block number -> how many patch tokens its token slimming module passes on (models/slimmed.py).
        tokens: how its blocks reduce tokens if `keep` is below 1.
        keep: share of the tokens that each dropping block passes on.
        resize: how a family resizes images to the size of a point.
    """

    architecture: str
    model_args: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any] = field(repr=False)
    embed_dim: int
    num_heads: int
    hidden_dim: int
    block: type[nn.Module] = Block
    features: bool = False
    tsm: Mapping[int, int] = field(default_factory=dict)
    tokens: TokenRule = field(default_factory=TokenRule)
    keep: Fraction = Fraction(1)
    resize: Resize = "bilinear"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def is_of_this_package(self) -> bool:
        """Whether `scala_cli` must be imported before timm knows the architecture."""
        return bool(self.tsm) or self.keep < 1 or is_model_in_modules(self.architecture, ("lvvit",))

    @property
    def token_counts(self) -> str:
        """Number of patch tokens in each stage: "196, 98, 49, 24"."""
        return ", ".join(map(str, (self.patches, *self.tsm.values())))

    @property
    def num_classes(self) -> int:
        return 0 if self.features else self.model_args["num_classes"]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        names = None if self.features else self.pretrained_cfg.get("label_names")
        return tuple(names) if names else None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        height, width = self.model_args["img_size"]
        return self.model_args["in_chans"], height, width

    @property
    def size(self) -> int | None:
        """Side of the image in pixels; None if images are not square."""
        _, height, width = self.input_size
        return height if height == width else None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch."""
        patch = self.model_args["patch_size"]
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        (_, height, width), patch = self.input_size, self.patch_size
        return height // patch[0], width // patch[1]

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return math.prod(self.grid)

    def at(self, ratio: Fraction) -> "Spec":
        """Returns the Spec of a narrower ViT. Raises PointError if the ratio leaves no whole channels."""
        if ratio == 1:
            return self
        head_dim = kept_count(self.head_dim, ratio)
        dim, hidden = head_dim * self.num_heads, kept_count(self.hidden_dim, ratio)
        if self.tsm:
            kept_count(self.embed_dim // 2, ratio)  # checks the modules' hidden layer
        # timm computes int(dim * mlp_ratio): half a channel more keeps the product above the integer
        narrow = {"embed_dim": dim, "num_heads": self.num_heads, "mlp_ratio": (hidden + 0.5) / dim}
        return replace(self, model_args={**self.model_args, **narrow}, embed_dim=dim, hidden_dim=hidden)

    def at_point(self, point: Point) -> "Spec":
        """Returns the Spec of a point: narrower, for another image size, with fewer tokens.

        Raises PointError if the width leaves no whole channels, the size is no multiple of the patch size, or
        the model cannot have another size or fewer tokens.
        """
        spec = replace(self.at(point.ratio), keep=point.keep)
        if self.tsm and (point.keep < 1 or point.size not in (None, self.size)):
            raise PointError(
                "the tokens of this model are slimmed already, for images of one size.",
                "Leave out the share and the size.",
            )
        if point.keep < 1 and self.block is not Block:
            raise PointError(
                f"the blocks of {self.architecture} cannot pass on fewer tokens.", "Leave out the share."
            )
        if point.size in (None, self.size):
            return spec
        for side in self.patch_size:
            if point.size % side:
                near = max(point.size // side, 1) * side
                raise PointError(
                    f"size {point.size} is not a multiple of the patch size, {side}.",
                    remedy="example",
                    setting="sizes",
                    value=near,
                )
        size = [point.size, point.size]
        cfg = {**self.pretrained_cfg, "input_size": [self.input_size[0], *size]}
        return replace(spec, model_args={**spec.model_args, "img_size": size}, pretrained_cfg=cfg)

    def of_fixed_size(self) -> "Spec":
        """Returns the Spec of a model for images of one size, without resampling the position embedding."""
        return replace(self, model_args={**self.model_args, "dynamic_img_size": False})

    def naming(self, classes: Sequence[str]) -> "Spec":
        """Returns the Spec with a head for these classes."""
        cfg = {**self.pretrained_cfg, "num_classes": len(classes), "label_names": list(classes)}
        args = {**self.model_args, "num_classes": len(classes)}
        return replace(self, model_args=args, pretrained_cfg=cfg, features=False)

    def build(self, slim: bool = False) -> VisionTransformer:
        """Returns the model's skeleton, on the meta device without weights, in evaluation mode.

        Args:
            slim: use SlimBlocks instead of timm's plain Blocks.
        """
        args: dict[str, Any] = {**self.model_args, "pretrained_cfg": dict(self.pretrained_cfg)}
        if (slim or self.tsm or self.keep < 1) and self.block is Block:
            merging = self.keep < 1 and self.tokens.kind == "merge"
            args["block_fn"] = SlimmedBlock if self.tsm else MergeBlock if merging else SlimBlock
        vit = skeleton(self.architecture, **args)
        put_behind(vit, self.tsm)
        if self.keep < 1:
            pass_on(vit, self.tokens, self.keep)
        return refuse_unless_plain(vit).eval()

    def build_with(self, state: Mapping[str, Tensor], origin: object = "the state") -> VisionTransformer:
        """Returns the model on the given tensors, without copying them.

        Raises CheckpointError, naming `origin` and the first key that does not fit.
        """
        model = self.build()
        refuse_misfit(model, state, origin)
        model.load_state_dict(state, assign=True)
        return model


def skeleton(architecture: str, **args: Any) -> nn.Module:
    """Returns timm's model on the meta device: all shapes, no weights.

    It skips timm's initialisation, which takes six times as long as everything else even on that device.
    """
    if is_model_in_modules(architecture, (*MODULES, "registered")):
        args["weight_init"] = "skip"
    with torch.device("meta"):
        model = timm.create_model(architecture, **args)
    for name in ("weight_init", "block_fn"):
        getattr(model, "_model_args", {}).pop(name, None)  # timm would save these with a model
    return model


def embedding_at(vit: Any, spec: Spec) -> Tensor:
    """Returns the position embedding for the size of a spec, (1, N, C), resampled by timm."""
    return resample_abs_pos_embed(
        vit.pos_embed.detach(),
        [*spec.grid],
        [*vit.patch_embed.grid_size],
        num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
    ).clone()


def random_images(spec: Spec, count: int) -> Tensor:
    """Returns random images (count, C, H, W), the same on every call."""
    return torch.randn(count, *spec.input_size, generator=torch.Generator().manual_seed(0))


NOT_ONE = "Its config.json and its weights are not of one model; convert or download it again."


def refuse_misfit(model: nn.Module, state: Mapping[str, Tensor], origin: object, hint: str = NOT_ONE) -> None:
    """Raises CheckpointError for the first key that is missing, unknown or of another shape."""
    wanted = model.state_dict()
    for name in [*wanted, *state]:
        if name not in state:
            raise CheckpointError(f"{origin} has no {name!r}, which the architecture needs.", hint)
        if name not in wanted:
            raise CheckpointError(f"{origin} holds {name!r}, which the architecture does not have.", hint)
        if state[name].shape != wanted[name].shape:
            found, need = tuple(state[name].shape), tuple(wanted[name].shape)
            raise CheckpointError(f"{origin}: {name!r} has shape {found}, not {need}.", hint)


def describe(model: nn.Module, args: Mapping[str, Any] | None = None) -> Spec:
    """Returns the Spec of a timm model; `args` are the arguments it was created with.

    Raises CheckpointError, with the reason, for a model that is not a plain VisionTransformer.
    """
    vit: Any = refuse_unless_plain(model)
    cfg = filter_pretrained_cfg(vit.pretrained_cfg, remove_source=True)
    cfg.pop("state_dict", None)
    patch = vit.patch_embed.patch_size
    model_args = {
        **(args or {}),
        **stem_args(vit),
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": image_channels(vit),
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
    }
    if cfg.get("num_classes") != vit.num_classes:
        cfg.pop("label_names", None)
    cfg["num_classes"] = vit.num_classes
    cfg["architecture"] = getattr(vit, "base", cfg["architecture"])  # set if it has token slimming modules
    cfg["input_size"] = [model_args["in_chans"], *model_args["img_size"]]
    block, tsm = vit.blocks[0], counts_of(vit)
    if tsm:
        model_args = {name: value for name, value in model_args.items() if name not in SLIMMED_ARGS}
    return Spec(
        architecture=cfg["architecture"],
        model_args=model_args,
        pretrained_cfg=cfg,
        embed_dim=width_of(vit),
        num_heads=block.attn.num_heads,
        hidden_dim=block.mlp.fc2.in_features,
        block=Block if isinstance(block, SlimBlock) else type(block),
        tsm=tsm,
    )


def width_of(vit: Any) -> int:
    """Returns the channels of the residual stream; `embed_dim` would be wrong for a pruned model."""
    return vit.patch_embed.proj.out_channels


def refuse_unless_plain(model: nn.Module) -> VisionTransformer:
    """Returns the model if it has only plain timm parts; else raises CheckpointError with the first reason.

    Types are compared exactly, as a subclass may use its parameters in another way.
    """
    vit: Any = model
    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        odd = first_odd_part(vit)
    else:
        odd = f"it is a {type(model).__name__}, not a VisionTransformer"
    if odd:
        raise CheckpointError(
            f"this model cannot be sliced: {odd}.",
            "DeiT, DeiT-III and plain vit_* models of timm can.",
            remedy="convert_example",
        )
    if odd := first_odd_size(vit):
        raise CheckpointError(
            f"this model cannot be sliced: {odd}.",
            "Give the model as it was before it was pruned, or prune all of its blocks alike.",
        )
    return vit


def first_odd_part(vit: VisionTransformer) -> str:
    """Returns the first part of a VisionTransformer that cannot be sliced; "" if there is none."""
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its patch embedding is a {type(vit.patch_embed).__name__}"
    if type(vit.attn_pool) not in (type(None), AttentionPoolLatent):
        return f"it pools by {type(vit.attn_pool).__name__}"
    for block in vit.blocks:
        if type(block) not in (Block, SlimBlock, MergeBlock, SlimmedBlock, ResPostBlock):
            return f"it has a {type(block).__name__} where a plain Block is needed"
        if type(block.attn) is not Attention:
            return f"it has a {type(block.attn).__name__} where a plain Attention is needed"
        if type(block.mlp) not in (Mlp, SwiGLU):
            return f"it has a {type(block.mlp).__name__} where a plain Mlp is needed"
    return ""


def first_odd_size(vit: Any) -> str:
    """Returns the first layer with another width than in a plain ViT; "" if there is none."""
    first = {name: parameter.shape for name, parameter in vit.blocks[0].named_parameters()}
    for number, block in enumerate(vit.blocks):
        for name, parameter in block.named_parameters():
            if parameter.shape != first.get(name, parameter.shape) and MODULE not in f".{name}":
                sizes = times(parameter.shape), times(first[name])
                return f"blocks.{number}.{name} is {sizes[0]}, blocks.0.{name} {sizes[1]}"
    read, written = width_of(vit), vit.blocks[0].attn.qkv.out_features
    if written != 3 * read:
        return f"its heads do not add up to its embedding (qkv has {written} outputs, not 3 x {read})"
    return ""


def times(shape: Sequence[int]) -> str:
    """Formats a shape: "3 x 224 x 224"."""
    return " x ".join(map(str, shape))


def has_bare_stream(vit: VisionTransformer) -> bool:
    """Whether the residual stream is the sum of what is written to it: no norm on it or after a branch.

    It must not be pooled by attention either, nor by maximum over tokens, which depends on the basis.
    """
    on_its_way = (vit.norm_pre, getattr(vit.patch_embed, "norm", nn.Identity()))
    return (
        all(isinstance(norm, nn.Identity) for norm in on_its_way)
        and all(isinstance(block, Block) for block in vit.blocks)
        and vit.attn_pool is None
        and vit.global_pool not in ("max", "avgmax")
    )


def choose_attention(vit: nn.Module, device: torch.device, bfloat16: bool) -> None:
    """Sets fused or explicit attention in a model; its narrower widths use the same.

    Fused, except in bfloat16 on a CPU, where explicit attention trains 1.9 times as fast (DeiT-Ti widths, 65
    tokens; docs/performance.md).
    """
    use_fused(vit, not (device.type == "cpu" and bfloat16))


def copy_attention(skeleton: Any, vit: Any) -> None:
    """Sets fused or explicit attention in a narrower model as in the full one."""
    fused = vit.blocks[0].attn.fused_attn
    if skeleton.blocks[0].attn.fused_attn != fused:
        use_fused(skeleton, fused)


def use_fused(vit: nn.Module, fused: bool) -> None:
    """Sets fused or explicit attention in every block and in attention pooling."""
    for module in vit.modules():
        if isinstance(module, Attention | AttentionPoolLatent):
            module.fused_attn = fused  # type: ignore[misc]  # Final for TorchScript only
