"""Cuts, exports and publishes the widths of a family."""
