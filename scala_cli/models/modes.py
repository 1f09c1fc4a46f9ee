"""Makes copies of a timm model for training, and gives narrower models the full model's modes."""

from copy import deepcopy
from typing import Any

from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import nn

from scala_cli.models.block import SlimBlock
from scala_cli.models.vit import Spec, copy_attention


def rebuilt(vit: VisionTransformer, spec: Spec) -> VisionTransformer:
    """Returns a copy for training with its own weights, in evaluation mode, its plain blocks SlimBlocks.

    It computes the same bit for bit until `skip_unread` is called on it.
    """
    again = spec.build(slim=True)
    again.load_state_dict({name: tensor.clone() for name, tensor in vit.state_dict().items()}, assign=True)
    copy_dropout(again, vit)
    for copied, parameter in zip(again.parameters(), vit.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)
    return again


def skip_unread(vit: VisionTransformer) -> None:
    """Makes the last block skip the tokens that the head does not read, if it reads class tokens only.

    Logits and gradients stay the same; this saves most of the last block's arithmetic (docs/performance.md).
    Do not use it if the features of every token are needed.
    """
    last: Any = vit.blocks[-1]
    plain = type(last) is SlimBlock and type(last.attn.q_norm) is type(last.attn.norm) is nn.Identity
    if plain and vit.global_pool == "token":
        last.read = 2 if isinstance(vit, VisionTransformerDistilled) else 1  # the head reads no register


def copy_modes(skeleton: VisionTransformer, vit: VisionTransformer) -> None:
    """Sets a skeleton's modes to those of the full model.

    The modes are training or evaluation, gradient checkpointing, fused or explicit attention, and whether the
    last block skips the tokens that the head does not read.
    """
    if skeleton.training != vit.training:
        skeleton.train(vit.training)
    skeleton.set_grad_checkpointing(vit.grad_checkpointing)
    copy_attention(skeleton, vit)
    if getattr(vit.blocks[-1], "read", None):
        skip_unread(skeleton)


def copy_dropout(skeleton: nn.Module, vit: nn.Module) -> None:
    """Copies the full model's dropout modules to a narrower one, even rates that no timm argument can set."""
    for name, module in vit.named_modules():
        layer, _, own = name.rpartition(".")
        if "drop" in own:
            setattr(skeleton.get_submodule(layer), own, deepcopy(module))
