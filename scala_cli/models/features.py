"""A ViT without a classifier, as one whose classifier is the identity.

Then its stream can be rotated like any other's, the full width computes what it did, and every slice answers
in the full model's own features: as many numbers, whatever its width. To timm it is an ordinary ViT.
"""

from typing import Any

from torch import nn
from torch.nn.utils import skip_init


def give_identity_head(vit: Any) -> bool:
    """Gives a timm ViT without a classifier the identity as its classifier, in place.

    Returns:
        Whether it had none.
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
