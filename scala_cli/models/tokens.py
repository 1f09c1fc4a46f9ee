"""What a ViT returns and every patch token beside it, all through its head.

The head of a backbone without a classifier is the identity of the full model (models/features.py), so all of
them lie in the full model's feature space, whatever the width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import Tensor

from scala_cli.models.slimmed import TokenSlimming, modules_of


def answer_and_patches(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Returns the model's own output, then its patch tokens through the head.

    Args:
        images: (B, channels, H, W), normalised.

    Returns:
        (B, 1 + patches, C). `[:, 0]` is what the model itself returns: its class token, or what it pools (the
        mean if it pools nothing). Register tokens are left out. Where tokens are slimmed, each patch has the
        mean of those that it went into.
    """
    with slimming(vit) as shares:
        tokens = vit.forward_features(images)
    return read_every(vit, tokens, shares)


def read_every(model: VisionTransformer, tokens: Tensor, shares: Sequence[Tensor] = ()) -> Tensor:
    """The same from (B, N, C) tokens after the last block and the norm that follows it.

    Every module is called once, so that hooks see each of them once.

    Args:
        shares: how tokens were slimmed, as `slimming` finds.
    """
    vit: Any = model
    patches = put_back(tokens[:, vit.num_prefix_tokens :], shares)
    if isinstance(vit, VisionTransformerDistilled):
        read = vit.head(torch.cat([tokens[:, :1], patches], 1))
        answer = (read[:, :1] + vit.head_dist(tokens[:, 1:2])) / 2
        return torch.cat([answer, read[:, 1:]], 1)
    kind = vit.global_pool or ("avg" if vit.cls_token is None else "token")
    pooled = vit.pool(tokens, kind)[:, None]
    return vit.head(vit.fc_norm(torch.cat([pooled, patches], 1)))


@contextmanager
def slimming(vit: VisionTransformer) -> Iterator[list[Tensor]]:
    """While active, collects how the model's token slimming modules distribute tokens, in order.

    Each is (B, tokens that go on, tokens that come in), without gradient; none in a model without modules.
    """
    found: list[Tensor] = []
    mine = get_ident()  # other threads may run the same model

    def note(module: TokenSlimming, read: tuple[Tensor, ...], wrote: Tensor) -> None:
        if get_ident() == mine:
            with torch.no_grad():  # gradient checkpointing would miss what is saved for it
                found.append(module.shares(read[0][:, module.prefix :]))

    hooks = [module.register_forward_hook(note) for module in modules_of(vit).values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def put_back(patches: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Returns a token for each patch of the image: the mean of those it went into, weighted by its share.

    Args:
        patches: (B, N, C) after the last of the modules that `shares` is of.
        shares: as `slimming` finds.
    """
    for share in reversed(shares):
        patches = (share / share.sum(1, keepdim=True)).mT @ patches
    return patches
