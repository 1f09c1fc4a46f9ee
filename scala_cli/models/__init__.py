"""Slimmable models: timm's own, plus a slicing rule."""
