"""Slicing geometry in pure torch: which channels of every parameter a narrower ViT keeps."""
