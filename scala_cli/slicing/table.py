"""The slicing table: for every parameter of a ViT, the channel group of each axis."""

import re
from dataclasses import dataclass
from typing import Literal

from scala_cli.errors import CheckpointError
from scala_cli.slicing.original import BASIS, BIAS, WEIGHT

Group = Literal["embed", "head", "hidden", "slim"]
Layout = Literal["aligned", "fused"]


@dataclass(frozen=True)
class Axis:
    """An axis that narrows with the width.

    Args:
        group: the channels it carries: those of the residual stream (embed), of the attention heads (head),
            of an MLP's hidden layer (hidden), or of a token slimming module's hidden layer (slim).
        blocks: number of equal runs that the axis consists of; each is cut.
    """

    group: Group
    blocks: int = 1


Table = dict[str, tuple[Axis | None, ...]]


def vit_table(num_heads: int, layout: Layout) -> Table:
    """Returns {parameter name (block number as `*`): its axes}; None is an axis that never narrows.

    Layout `aligned` cuts q, k, v and every head separately, so that a channel has the same role at every
    width: qkv's rows are 3 x heads runs of head_dim. Layout `fused` cuts the (3C, C) weight as one run, as
    the released Scala code does.
    """
    embed, hidden = Axis("embed"), Axis("hidden")
    qkv = Axis("head", 3 * num_heads if layout == "aligned" else 1)
    attended = Axis("head", num_heads if layout == "aligned" else 1)
    within_head = Axis("head")
    key_value = Axis("head", 2 * num_heads if layout == "aligned" else 1)
    mlps = ("blocks.*.mlp", "attn_pool.mlp")
    outer = ("patch_embed.norm", "norm_pre", "norm", "fc_norm", "attn_pool.norm")
    norms = (*outer, "blocks.*.norm1", "blocks.*.norm2", "blocks.*.tsm.norm")
    slim = Axis("slim")
    return {
        "cls_token": (None, None, embed),
        "dist_token": (None, None, embed),
        "reg_token": (None, None, embed),
        "pos_embed": (None, None, embed),
        "patch_embed.proj.weight": (embed, None, None, None),
        "patch_embed.proj.bias": (embed,),
        "patch_embed.proj.before.*.weight": (None, None, None, None),
        "patch_embed.proj.before.*.bias": (None,),
        **{f"{norm}.{part}": (embed,) for norm in norms for part in ("weight", "bias")},
        "blocks.*.attn.qkv.weight": (qkv, embed),
        "blocks.*.attn.qkv.bias": (qkv,),
        **{f"blocks.*.attn.{n}_norm.{p}": (within_head,) for n in "qk" for p in ("weight", "bias")},
        **{f"blocks.*.attn.norm.{part}": (attended,) for part in ("weight", "bias")},
        "blocks.*.attn.proj.weight": (embed, attended),
        "blocks.*.attn.proj.bias": (embed,),
        "blocks.*.ls1.gamma": (embed,),
        **{f"{mlp}.{fc}.weight": (hidden, embed) for mlp in mlps for fc in ("fc1", "fc1_g", "fc1_x")},
        **{f"{mlp}.{part}.bias": (hidden,) for mlp in mlps for part in ("fc1", "fc1_g", "fc1_x", "norm")},
        **{f"{mlp}.norm.weight": (hidden,) for mlp in mlps},
        **{f"{mlp}.fc2.weight": (embed, hidden) for mlp in mlps},
        **{f"{mlp}.fc2.bias": (embed,) for mlp in mlps},
        "blocks.*.ls2.gamma": (embed,),
        "blocks.*.tsm.key.weight": (slim, embed),
        "blocks.*.tsm.key.bias": (slim,),
        "blocks.*.tsm.query.weight": (None, slim),
        "blocks.*.tsm.query.bias": (None,),
        "blocks.*.tsm.scale": (None,),
        "blocks.*.tsm.bias": (None, None),
        "attn_pool.latent": (None, None, embed),
        "attn_pool.q.weight": (attended, embed),
        "attn_pool.q.bias": (attended,),
        "attn_pool.kv.weight": (key_value, embed),
        "attn_pool.kv.bias": (key_value,),
        "attn_pool.proj.weight": (embed, attended),
        "attn_pool.proj.bias": (embed,),
        "head.weight": (None, embed),
        "head.bias": (None,),
        "head_dist.weight": (None, embed),
        "head_dist.bias": (None,),
        BASIS: (embed, None),
        WEIGHT: (None, embed),
        BIAS: (None,),
    }


def axes_of(name: str, table: Table) -> tuple[Axis | None, ...]:
    """Returns the axes of a parameter, also of a width's or size's own, such as "@160:pos_embed".

    Raises CheckpointError if the table has no row for it.
    """
    try:
        return table[re.sub(r"^(blocks|patch_embed\.proj\.before)\.\d+", r"\1.*", name.rpartition(":")[2])]
    except KeyError:
        raise CheckpointError(
            f"parameter {name!r} is unknown to the slicing table.",
            "Only plain timm VisionTransformers can be sliced; see docs/architecture.md",
        ) from None
