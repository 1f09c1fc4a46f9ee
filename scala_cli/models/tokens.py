"""Computes the output of a ViT together with its patch tokens, all passed through its head.

The head of a backbone without a classifier starts as the identity (models/features.py), so at every width
all of them are in the full model's feature space.
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
        (B, 1 + patches, C). `[:, 0]` is the model's own output: of the class token or the pooled token (the
        mean if the model does not pool). Register tokens are left out. If tokens are slimmed, each patch gets
        the mean of the tokens that it was merged into.
    """
    with slimming(vit) as shares:
        tokens = vit.forward_features(images)
    return read_every(vit, tokens, shares)


def read_every(model: VisionTransformer, tokens: Tensor, shares: Sequence[Tensor] = ()) -> Tensor:
    """Returns the same as `answer_and_patches`, from (B, N, C) tokens after the last block and its norm.

    Every module is called once, so that hooks run once.

    Args:
        shares: weights of the token slimming modules, from `slimming`.
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
    """Yields a list that collects the weights of the model's token slimming modules during a forward.

    Each is (B, tokens going out, tokens coming in), without gradient. A model without modules has none.
    """
    found: list[Tensor] = []
    mine = get_ident()  # other threads may run the same model

    def note(module: TokenSlimming, read: tuple[Tensor, ...], wrote: Tensor) -> None:
        if get_ident() == mine:
            with torch.no_grad():  # the recomputation of gradient checkpointing runs without this hook
                found.append(module.shares(read[0][:, module.prefix :]))

    hooks = [module.register_forward_hook(note) for module in modules_of(vit).values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def put_back(patches: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Returns a token for each patch of the image: the weighted mean of the tokens that it was merged into.

    Args:
        patches: (B, N, C) after the last of the modules in `shares`.
        shares: weights of the token slimming modules, from `slimming`.
    """
    for share in reversed(shares):
        patches = (share / share.sum(1, keepdim=True)).mT @ patches
    return patches
