"""A ViT without a classifier, given the identity as its classifier.

Its stream can then be rotated like any other, the full width computes the same as before, and every slice
returns the full model's features, as many at every width. To timm it is an ordinary ViT.
"""

from typing import Any

from torch import nn
from torch.nn.utils import skip_init


def give_identity_head(vit: Any) -> bool:
    """Gives a timm ViT without a classifier the identity as its classifier, in place.

    Returns:
        Whether the model had no classifier.
    """
    if vit.num_classes:
        return False
    weight = vit.patch_embed.proj.weight
    channels = len(weight)
    for name in ("head", "head_dist"):
        if hasattr(vit, name):
            head = skip_init(nn.Linear, channels, channels, device=weight.device, dtype=weight.dtype)
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
            setattr(vit, name, head)
    vit.num_classes = channels
    return True
