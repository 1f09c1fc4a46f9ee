"""timm's Vision Transformers: the only file that knows their internals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent, Mlp, PatchEmbed, SwiGLU, set_fused_attn
from timm.models import VisionTransformer, VisionTransformerDistilled, filter_pretrained_cfg
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from scala_cli.errors import CheckpointError, naming_failure
from scala_cli.models.skeleton import without_weights
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import kept_count


@dataclass(frozen=True)
class Spec:
    """Everything timm needs to build one ViT again, and the three widths that slicing narrows.

    Args:
        architecture: timm's name, without a tag.
        model_args: arguments for `timm.create_model`, JSON-able.
        pretrained_cfg: timm's input and label settings (mean, std, interpolation, label_names, ...).
    """

    architecture: str
    model_args: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any] = field(repr=False)
    embed_dim: int
    num_heads: int
    hidden_dim: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_classes(self) -> int:
        return self.model_args["num_classes"]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        names = self.pretrained_cfg.get("label_names")
        return tuple(names) if names else None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        height, width = self.model_args["img_size"]
        return self.model_args["in_chans"], height, width

    def at(self, point: Point) -> "Spec":
        """The narrower ViT at `point`, as timm builds it. Raises PointError where it does not divide."""
        if point.ratio == 1:
            return self
        head_dim = kept_count(self.head_dim, point)
        dim, hidden = head_dim * self.num_heads, kept_count(self.hidden_dim, point)
        # timm computes int(dim * mlp_ratio): half a channel more keeps the product above the integer
        narrow = {"embed_dim": dim, "num_heads": self.num_heads, "mlp_ratio": (hidden + 0.5) / dim}
        return replace(self, model_args={**self.model_args, **narrow}, embed_dim=dim, hidden_dim=hidden)

    def of_fixed_size(self) -> "Spec":
        """The same model, which does not resample its position embedding to the image."""
        return replace(self, model_args={**self.model_args, "dynamic_img_size": False})

    def naming(self, classes: Sequence[str]) -> "Spec":
        """The same model with a class of its head for each name."""
        cfg = {**self.pretrained_cfg, "num_classes": len(classes), "label_names": list(classes)}
        return replace(self, model_args={**self.model_args, "num_classes": len(classes)}, pretrained_cfg=cfg)

    def build(self) -> VisionTransformer:
        """A skeleton of the model, without weights, in evaluation mode."""
        with without_weights():
            model = timm.create_model(
                self.architecture, pretrained_cfg=dict(self.pretrained_cfg), **self.model_args
            )
        return refuse_unless_plain(model).eval()

    def build_with(self, state: Mapping[str, Tensor], origin: object = "the state") -> VisionTransformer:
        """The model on the given tensors, not copied.

        Raises CheckpointError, naming `origin` and the first key that does not fit.
        """
        model = self.build()
        refuse_misfit(model, state, origin)
        model.load_state_dict(state, assign=True)
        return model


def random_images(spec: Spec, count: int) -> Tensor:
    """(count, C, H, W), the same on every call."""
    return torch.randn(count, *spec.input_size, generator=torch.Generator().manual_seed(0))


def refuse_misfit(model: nn.Module, state: Mapping[str, Tensor], origin: object) -> None:
    """Raises CheckpointError for the first key that is missing, unknown or of another shape."""
    wanted = model.state_dict()
    hint = "Its config.json and its weights are not of one model; convert or download it again."
    for name in [*wanted, *state]:
        if name not in state:
            raise CheckpointError(f"{origin} has no {name!r}, which the architecture needs.", hint)
        if name not in wanted:
            raise CheckpointError(f"{origin} holds {name!r}, which the architecture does not have.", hint)
        if state[name].shape != wanted[name].shape:
            found, need = tuple(state[name].shape), tuple(wanted[name].shape)
            raise CheckpointError(f"{origin}: {name!r} has shape {found}, not {need}.", hint)


def describe(model: nn.Module, args: Mapping[str, Any] | None = None) -> Spec:
    """The Spec of a timm model; `args` are the arguments it was created with.

    Raises CheckpointError, with the reason, for a model that is not a plain VisionTransformer.
    """
    vit: Any = refuse_unless_plain(model)
    cfg = filter_pretrained_cfg(vit.pretrained_cfg, remove_source=True)
    cfg.pop("state_dict", None)
    patch = vit.patch_embed.patch_size
    model_args = {
        **(args or {}),
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": vit.patch_embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
    }
    if cfg.get("num_classes") != vit.num_classes:
        cfg.pop("label_names", None)
    cfg["num_classes"] = vit.num_classes
    cfg["input_size"] = [model_args["in_chans"], *model_args["img_size"]]
    block = vit.blocks[0]
    return Spec(
        architecture=cfg["architecture"],
        model_args=model_args,
        pretrained_cfg=cfg,
        embed_dim=vit.embed_dim,
        num_heads=block.attn.num_heads,
        hidden_dim=block.mlp.fc2.in_features,
    )


TRAITS: Mapping[str, Callable[[Any], Any]] = {
    "class_token": lambda vit: vit.cls_token is not None,
    "reg_tokens": lambda vit: vit.num_reg_tokens,
    "no_embed_class": lambda vit: vit.no_embed_class,
    "pos_embed": lambda vit: "none" if vit.pos_embed is None else "learn",
    "pre_norm": lambda vit: not isinstance(vit.norm_pre, nn.Identity),
    "final_norm": lambda vit: (
        not isinstance(vit.norm, nn.Identity) or not isinstance(vit.fc_norm, nn.Identity)
    ),
    "fc_norm": lambda vit: not isinstance(vit.fc_norm, nn.Identity),
    "qkv_bias": lambda vit: vit.blocks[0].attn.qkv.bias is not None,
    "proj_bias": lambda vit: vit.blocks[0].attn.proj.bias is not None,
    "qk_norm": lambda vit: not isinstance(vit.blocks[0].attn.q_norm, nn.Identity),
    "init_values": lambda vit: 1e-5 if hasattr(vit.blocks[0].ls1, "gamma") else None,
}
"""Arguments of timm's constructor that a model shows."""


def read_off(model: nn.Module) -> Spec:
    """The Spec of a model of which nobody knows what `timm.create_model` was given beside the name.

    Raises CheckpointError as `describe`, and where what can be read off the model does not rebuild it.
    """
    vit: Any = refuse_unless_plain(model)
    sizes = {
        "depth": len(vit.blocks),
        "embed_dim": vit.embed_dim,
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": (vit.blocks[0].mlp.fc2.in_features + 0.5) / vit.embed_dim,
    }
    plain = describe(vit, sizes).build()
    differing = {name: of(vit) for name, of in TRAITS.items() if of(vit) != of(plain)}
    return describe(vit, {**sizes, **differing})


def spec_of(config: Mapping[str, Any]) -> Spec:
    """The Spec of timm's config.json. Raises CheckpointError, also for an architecture timm lacks."""
    hint = "Convert or download it again."
    for key in ("architecture", "model_args", "pretrained_cfg"):
        if key not in config:
            raise CheckpointError(f"config.json lacks {key!r}.", hint)
    name, args = config["architecture"], config["model_args"]
    with naming_failure(f"config.json is damaged: timm cannot build {name}", hint, CheckpointError):
        cfg = {**config["pretrained_cfg"], "architecture": name}
        if config.get("label_names"):
            cfg["label_names"] = config["label_names"]
        if not timm.is_model(name):
            raise CheckpointError(
                f"this timm ({timm.__version__}) has no architecture {name!r}.",
                "Upgrade: pip install -U timm",
            )
        with without_weights():
            return describe(timm.create_model(name, pretrained_cfg=cfg, **args), args)


def refuse_unless_plain(model: nn.Module) -> VisionTransformer:
    """The same model, if stock parts make it up; else CheckpointError with the first reason found.

    Types are compared exactly: a subclass may use its parameters in another way.
    """
    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        assert isinstance(model, VisionTransformer)
        reason = first_odd_part(model)
        if not reason:
            return model
    else:
        reason = f"it is a {type(model).__name__}, not a VisionTransformer"
    raise CheckpointError(
        f"this model cannot be sliced: {reason}.",
        "DeiT, DeiT-III and plain vit_* models of timm can; for example: scala convert deit_s",
    )


def first_odd_part(vit: VisionTransformer) -> str:
    """What of a VisionTransformer is not stock; empty for a plain one."""
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its patch embedding is a {type(vit.patch_embed).__name__}"
    if type(vit.attn_pool) not in (type(None), AttentionPoolLatent):
        return f"it pools by {type(vit.attn_pool).__name__}"
    for block in vit.blocks:
        if type(block) not in (Block, ResPostBlock):
            return f"it has a {type(block).__name__} where a plain Block is needed"
        if type(block.attn) is not Attention:
            return f"it has a {type(block.attn).__name__} where a plain Attention is needed"
        if type(block.mlp) not in (Mlp, SwiGLU):
            return f"it has a {type(block.mlp).__name__} where a plain Mlp is needed"
        if block.attn.qkv.out_features != 3 * vit.embed_dim:
            return "its heads do not add up to its embedding"
    return ""


class LastBlock(Block):
    """timm's block as the last one, where only the first tokens are read: it computes no others.

    These attend to all tokens: torch's own attention takes queries of their own. For so few the explicit
    one, which has the attention's weights at hand, is at least as fast as the fused (docs/performance.md).
    """

    read: int

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no masks: training has none
        """(B, N, C) -> (B, read, C)"""
        attn: Any = self.attn
        tokens = self.norm1(x).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            tokens[: self.read],
            tokens,
            tokens,
            attn.attn_dim,
            attn.num_heads,
            attn.qkv.weight,
            attn.qkv.bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=attn.attn_drop.p,
            out_proj_weight=attn.proj.weight,
            out_proj_bias=attn.proj.bias,
            training=self.training,
            average_attn_weights=False,
        )
        x = x[:, : self.read] + self.drop_path1(self.ls1(attn.proj_drop(attended.transpose(0, 1))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def has_bare_stream(vit: VisionTransformer) -> bool:
    """Whether the residual stream is what is written to it: no norm on its way, none after a branch.

    Nor is it pooled by attention, which reads it past the last norm.
    """
    on_its_way = (vit.norm_pre, getattr(vit.patch_embed, "norm", nn.Identity()))
    return (
        all(isinstance(norm, nn.Identity) for norm in on_its_way)
        and all(type(block) is Block for block in vit.blocks)
        and vit.attn_pool is None
    )


def skip_unread(vit: VisionTransformer) -> None:
    """Spares the last block what the head does not read, where that reads a class token alone.

    Logits and gradients stay the same. Of n blocks it saves most of one's arithmetic (docs/performance.md).
    What wants the features of every token must not do this.
    """
    last: Any = vit.blocks[-1]
    plain = type(last) is Block and type(last.attn.q_norm) is type(last.attn.norm) is nn.Identity
    if plain and vit.global_pool == "token":
        last.__class__ = LastBlock
        last.read = 2 if isinstance(vit, VisionTransformerDistilled) else 1  # registers are not


def choose_attention(vit: VisionTransformer, device: torch.device, bfloat16: bool) -> None:
    """Which of timm's two implementations of attention this model, and those built from here on, use.

    Fused attention, except in bfloat16 on a CPU, where the explicit one trains 1.9 times as fast (DeiT-Ti
    widths, 65 tokens; docs/performance.md).
    """
    fused = not (device.type == "cpu" and bfloat16)
    set_fused_attn(fused)
    for module in vit.modules():
        if isinstance(module, Attention | AttentionPoolLatent):
            module.fused_attn = fused  # type: ignore[misc]  # Final for TorchScript only
