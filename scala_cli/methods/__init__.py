"""Training methods by name; each is in the module of that name.

This module does not import torch, so that the command line checks names without delay.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scala_cli.methods.base import Method

METHODS = {
    "scala": ("Scala", "all widths at once"),
    "supervit": ("SuperViT", "one width at many image sizes and shares of tokens"),
    "sit": ("SiT", "one width that passes on fewer tokens, stage by stage"),
    "usnet": ("USNet", "all widths, taught by the full one as it learns: a baseline"),
    "separate": ("Separate", "one width alone: a baseline"),
}
"""Name -> class, and what it trains. The order is that of help texts."""
VARIANTS = {"paper": "scala as its authors released it"}
"""Further methods of `scala compare`: the `recipes` of all classes."""
ONE_POINT = "separate"
"""The method that trains one width alone; also used when the full width learns new classes first."""


def method_named(name: str) -> "type[Method]":
    """Returns the class of a method. Raises KeyError for a name that is not in METHODS."""
    return getattr(import_module(f"scala_cli.methods.{name}"), METHODS[name][0])
