"""Slim pretrained Vision Transformers: train once, cut any width, deploy what fits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scala_cli.with_timm import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scala_cli.cascade import Cascade
    from scala_cli.deploy.slice import slice_model
    from scala_cli.models.calibrate import calibrate
    from scala_cli.models.checkpoint import load
    from scala_cli.models.in_memory import slimmable
    from scala_cli.models.slimmable import SlimmableViT
    from scala_cli.slicing.point import Point

__all__ = ["Cascade", "Point", "SlimmableViT", "__version__", "calibrate", "load", "slice_model", "slimmable"]

_HOMES = {
    "load": "scala_cli.models.checkpoint",
    "SlimmableViT": "scala_cli.models.slimmable",
    "Point": "scala_cli.slicing.point",
    "slice_model": "scala_cli.deploy.slice",
    "Cascade": "scala_cli.cascade",
    "calibrate": "scala_cli.models.calibrate",
    "slimmable": "scala_cli.models.in_memory",
}

register()


def __getattr__(name: str) -> Any:
    # torch and timm take seconds to import: only when one of these is asked for
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
