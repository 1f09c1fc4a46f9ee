"""What a ViT returns and every patch token beside it, all through its head.

The head of a backbone without a classifier is the identity of the full model (models/features.py), so all of
them lie in the full model's feature space, whatever the width.
"""

from typing import Any

import torch
from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import Tensor


def answer_and_patches(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Returns the model's own output, then its patch tokens through the head.

    Args:
        images: (B, channels, H, W), normalised.

    Returns:
        (B, 1 + patches, C). `[:, 0]` is what the model itself returns: its class token, or what it pools (the
        mean if it pools nothing). Register tokens are left out.
    """
    return read_every(vit, vit.forward_features(images))


def read_every(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """The same from (B, N, C) tokens after the last block and the norm that follows it.

    Every module is called once, so that hooks see each of them once.
    """
    vit: Any = model
    patches = tokens[:, vit.num_prefix_tokens :]
    if isinstance(vit, VisionTransformerDistilled):
        read = vit.head(torch.cat([tokens[:, :1], patches], 1))
        answer = (read[:, :1] + vit.head_dist(tokens[:, 1:2])) / 2
        return torch.cat([answer, read[:, 1:]], 1)
    kind = vit.global_pool or ("avg" if vit.cls_token is None else "token")
    pooled = vit.pool(tokens, kind)[:, None]
    return vit.head(vit.fc_norm(torch.cat([pooled, patches], 1)))
