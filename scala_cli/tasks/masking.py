"""Hides half of the patches of images, for a student that learns to predict the teacher's features there.

timm's ViTs have no mask token. Instead a hidden patch gets the mean colour, zeros after normalisation, so its
token is the bias of the patch embedding plus its position. The model needs no change for this.
"""

import torch
from torch import Tensor

from scala_cli.models.vit import Spec


def hide_half(images: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Returns the images with a random half of the patches of each hidden, and which patches these are.

    Random numbers come from torch's global CPU generator, so they are the same on every device.

    Args:
        images: (B, C, H, W), normalised.

    Returns:
        images (B, C, H, W), and (B, patches) booleans, patches row by row.
    """
    (rows, columns), (height, width) = spec.grid, spec.patch_size
    hidden = torch.rand(len(images), spec.patches).argsort(1) < max(1, spec.patches // 2)
    hidden = hidden.to(images.device)
    pixels = hidden.unflatten(1, (1, rows, columns)).repeat_interleave(height, 2).repeat_interleave(width, 3)
    masked = images.clone()  # its last rows and columns may belong to no patch
    masked[..., : rows * height, : columns * width].masked_fill_(pixels, 0)
    return masked, hidden
