"""How a model of timm is run: copies for training, and narrower ones that behave as the full one does."""

from copy import deepcopy
from typing import Any

from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import nn

from scala_cli.models.block import SlimBlock
from scala_cli.models.vit import Spec, copy_attention


def rebuilt(vit: VisionTransformer, spec: Spec) -> VisionTransformer:
    """A copy with weights of its own, in evaluation mode, whose plain blocks are SlimBlocks.

    For training: it computes what the model does, bit for bit, until `skip_unread` is asked of it.
    """
    again = spec.build(slim=True)
    again.load_state_dict({name: tensor.clone() for name, tensor in vit.state_dict().items()}, assign=True)
    copy_dropout(again, vit)
    for copied, parameter in zip(again.parameters(), vit.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)
    return again


def skip_unread(vit: VisionTransformer) -> None:
    """Spares the last block what the head does not read, where that reads a class token alone.

    Logits and gradients stay the same. Of n blocks it saves most of one's arithmetic (docs/performance.md).
    What wants the features of every token must not do this.
    """
    last: Any = vit.blocks[-1]
    plain = type(last) is SlimBlock and type(last.attn.q_norm) is type(last.attn.norm) is nn.Identity
    if plain and vit.global_pool == "token":
        last.read = 2 if isinstance(vit, VisionTransformerDistilled) else 1  # registers are not


def copy_modes(skeleton: VisionTransformer, vit: VisionTransformer) -> None:
    """Sets a skeleton's modes to those of the full model.

    They are training or evaluation, gradient checkpointing, fused or explicit attention, and whether the last
    block skips the tokens that the head does not read.
    """
    if skeleton.training != vit.training:
        skeleton.train(vit.training)
    skeleton.set_grad_checkpointing(vit.grad_checkpointing)
    copy_attention(skeleton, vit)
    if getattr(vit.blocks[-1], "read", None):
        skip_unread(skeleton)


def copy_dropout(skeleton: nn.Module, vit: nn.Module) -> None:
    """Gives a narrower model the full one's dropout, also where no argument of timm can say it."""
    for name, module in vit.named_modules():
        layer, _, own = name.rpartition(".")
        if "drop" in own:
            setattr(skeleton.get_submodule(layer), own, deepcopy(module))
