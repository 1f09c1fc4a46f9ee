"""Images half of whose patches are hidden, for a student that learns to tell what a teacher sees there.

timm's ViTs have no mask token. Here a hidden patch is painted in the mean colour, which normalisation turns
to zeros: to the model it is the bias of the patch embedding, and its position. So every width runs as on any
image, and nothing is added to the model.
"""

import torch
from torch import Tensor

from scala_cli.models.vit import Spec


def hide_half(images: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Returns the images with half of the patches of each hidden, at random, and which these are.

    Random numbers come from torch's global generator of the CPU, so they are the same on every device.

    Args:
        images: (B, C, H, W), normalised.

    Returns:
        images (B, C, H, W), and (B, patches) booleans, patches row by row.
    """
    (rows, columns), (height, width) = spec.grid, spec.patch_size
    hidden = torch.rand(len(images), spec.patches).argsort(1) < max(1, spec.patches // 2)
    hidden = hidden.to(images.device)
    pixels = hidden.unflatten(1, (1, rows, columns)).repeat_interleave(height, 2).repeat_interleave(width, 3)
    masked = images.clone()  # its last rows and columns may be of no patch
    masked[..., : rows * height, : columns * width].masked_fill_(pixels, 0)
    return masked, hidden
