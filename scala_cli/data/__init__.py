"""Images and labels, read through timm."""
