"""Makes a slimmable ViT from a timm model in memory, sharing its parameters and leaving it unchanged."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from scala_cli.errors import CheckpointError
from scala_cli.models.features import give_identity_head
from scala_cli.models.modes import copy_dropout
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.views import evaluating
from scala_cli.models.vit import (
    Spec,
    copy_attention,
    describe,
    random_images,
    refuse_misfit,
    refuse_unless_plain,
    width_of,
)
from scala_cli.settings import DEFAULT_RATIOS
from scala_cli.slicing.point import parse_points, widths_of
from scala_cli.slicing.rule import Rule


def slimmable(model: nn.Module, ratios: str = DEFAULT_RATIOS) -> SlimmableViT:
    """Returns a slimmable ViT made from a timm model in memory.

    The result shares the model's parameters, so training one trains the other. Nothing else is shared: the
    model keeps its head, flags and settings.

    Args:
        ratios: the widths, such as "0.25,0.5,0.75,1", or any points, such as "1@128~0.5,1@224".

    Raises:
        CheckpointError: if the model cannot be sliced, or timm cannot rebuild it from its attributes.
        PointError: if a width does not divide the model's channels.
    """
    vit, spec, points = refuse_unless_plain(model), infer_spec(model), parse_points(ratios)
    for point in points:
        spec.at_point(point)
    again = sharing_parameters(vit, spec)
    probe = random_images(spec, 2).to(next(vit.parameters()))
    with torch.no_grad(), evaluating(vit):
        same = torch.equal(again(probe), vit(probe))
    if not same:
        raise CheckpointError(
            f"timm's {spec.architecture} computes something else than this model.",
            "Save it with what it was created with, and convert that: "
            "timm.models.save_for_hf(model, DIR, model_args=...)",
        )
    if give_identity_head(again):
        spec = replace(describe(again, spec.model_args), features=True)
    rule = Rule(widths_of(points), spec.num_heads)
    return SlimmableViT(again, spec, rule, points=points).train(model.training)


def sharing_parameters(vit: VisionTransformer, spec: Spec) -> VisionTransformer:
    """Returns timm's model of a spec with the parameters and behaviour of `vit`, in evaluation mode.

    Raises CheckpointError if they do not fit.
    """
    again = spec.build()
    hint = "Its layers are not as timm makes them: give the model as it was before."
    refuse_misfit(again, vit.state_dict(), f"this {spec.architecture}", hint)
    for name, parameter in vit.named_parameters():
        layer, _, own = name.rpartition(".")
        again.get_submodule(layer).register_parameter(own, parameter)
    copy_dropout(again, vit)
    copy_attention(again, vit)
    again.set_grad_checkpointing(vit.grad_checkpointing)
    return again.eval()


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
    "scale_attn_norm": lambda vit: not isinstance(vit.blocks[0].attn.norm, nn.Identity),
    "scale_mlp_norm": lambda vit: not isinstance(vit.blocks[0].mlp.norm, nn.Identity),
    "init_values": lambda vit: 1e-5 if hasattr(vit.blocks[0].ls1, "gamma") else None,
    "pool_include_prefix": lambda vit: vit.pool_include_prefix,
    "dynamic_img_size": lambda vit: vit.dynamic_img_size,
    "dynamic_img_pad": lambda vit: vit.patch_embed.dynamic_img_pad,
    "drop_rate": lambda vit: rate_of(vit.head_drop),
    "pos_drop_rate": lambda vit: rate_of(vit.pos_drop),
    "patch_drop_rate": lambda vit: rate_of(vit.patch_drop),
    "proj_drop_rate": lambda vit: rate_of(vit.blocks[0].attn.proj_drop),
    "attn_drop_rate": lambda vit: rate_of(vit.blocks[0].attn.attn_drop),
    "drop_path_rate": lambda vit: rate_of(vit.blocks[-1].drop_path1),  # timm's rates grow evenly to this
}
"""Arguments of timm's constructor that can be read from a model."""


def rate_of(dropout: Any) -> float:
    """Returns the rate of a dropout module of timm or torch; 0 for an identity."""
    rates = (getattr(dropout, name, 0.0) for name in ("p", "prob", "drop_prob"))
    return round(max(rates), 6)  # timm spreads drop_path over the blocks in float32


def infer_spec(model: nn.Module) -> Spec:
    """Returns the Spec of a model whose arguments to `timm.create_model` are unknown.

    Raises CheckpointError as `describe`, and if the arguments read from the model do not rebuild it.
    """
    vit: Any = refuse_unless_plain(model)
    sizes = {
        "depth": len(vit.blocks),
        "embed_dim": width_of(vit),
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": (vit.blocks[0].mlp.fc2.in_features + 0.5) / width_of(vit),
    }
    plain = describe(vit, sizes).build()
    differing = {name: of(vit) for name, of in TRAITS.items() if of(vit) != of(plain)}
    return describe(vit, {**sizes, **differing})
