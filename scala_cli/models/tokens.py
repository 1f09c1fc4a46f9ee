"""Computes the output of a ViT together with its patch tokens, all passed through its head.

The head of a backbone without a classifier starts as the identity (models/features.py), so at every width
all of them are in the full model's feature space.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import Tensor, nn

from scala_cli.models.block import Reverse
from scala_cli.models.slimmed import modules_of


def answer_and_patches(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Returns the model's own output, then its patch tokens through the head.

    Args:
        images: (B, channels, H, W), normalised.

    Returns:
        (B, 1 + patches, C). `[:, 0]` is the model's own output: of the class token or the pooled token (the
        mean if the model does not pool). Register tokens are left out. If tokens are slimmed, each patch gets
        the mean of the tokens that it was merged into; if they are dropped, the last token that it had.
    """
    with reductions(vit) as reduced:
        tokens = vit.forward_features(images)
    return read_every(vit, tokens, reduced)


def read_every(model: VisionTransformer, tokens: Tensor, reduced: Sequence["Reduced"] = ()) -> Tensor:
    """Returns the same as `answer_and_patches`, from (B, N, C) tokens after the last block and its norm.

    Every module is called once, so that hooks run once; the norm again only for dropped tokens.

    Args:
        reduced: from `reductions`.
    """
    vit: Any = model
    patches = put_back(tokens[:, vit.num_prefix_tokens :], reduced, vit.norm)
    if isinstance(vit, VisionTransformerDistilled):
        read = vit.head(torch.cat([tokens[:, :1], patches], 1))
        answer = (read[:, :1] + vit.head_dist(tokens[:, 1:2])) / 2
        return torch.cat([answer, read[:, 1:]], 1)
    kind = vit.global_pool or ("avg" if vit.cls_token is None else "token")
    pooled = vit.pool(tokens, kind)[:, None]
    return vit.head(vit.fc_norm(torch.cat([pooled, patches], 1)))


class Reduced(NamedTuple):
    """A reduction of the patch tokens in a forward.

    Args:
        block: number of the block that it follows or belongs to, from 0.
        reverse: puts the tokens back.
    """

    block: int
    reverse: Reverse


@contextmanager
def reductions(vit: Any) -> Iterator[list[Reduced]]:
    """Yields a list that collects how the model drops or slims its patch tokens during a forward.

    Merged tokens are put back by the model itself.
    """
    found: list[Reduced] = []
    mine = get_ident()  # other threads may run the same model

    def note(number: int, module: Any, read: Any, wrote: Any) -> None:
        if get_ident() == mine:  # the recomputation of gradient checkpointing runs without this hook
            found.append(Reduced(number, module.reverse(read, wrote)))

    modules = {n: b.dropping for n, b in enumerate(vit.blocks) if getattr(b, "dropping", None)}
    hooks = [
        module.register_forward_hook(partial(note, number))
        for number, module in [*modules.items(), *modules_of(vit).items()]
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def put_back(patches: Tensor, reduced: Sequence[Reduced], norm: nn.Module | None = None) -> Tensor:
    """Returns a token for each patch of the image, (B, N, C).

    Args:
        patches: (B, k, C) after the reductions.
        reduced: from `reductions`.
        norm: the norm that `patches` have passed, if any.
    """
    for each in reversed(reduced):
        patches = each.reverse(patches, norm or nn.Identity())
    return patches
