"""Resizes a batch of images to the size of a point."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

Resize = Literal["bilinear", "bicubic"]
HOW: dict[Resize, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "align_corners": True},  # SuperViT, arXiv 2205.11397
    "bicubic": {"mode": "bicubic", "antialias": True},
}


def resized(images: Tensor, size: int, how: Resize = "bilinear") -> Tensor:
    """Resizes images (B, C, H, W) to (B, C, size, size); images of that size are returned unchanged."""
    return images if images.shape[-2:] == (size, size) else F.interpolate(images, (size, size), **HOW[how])
