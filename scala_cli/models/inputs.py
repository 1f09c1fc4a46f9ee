"""Checks timm's image and label settings before they are used."""

from collections.abc import Mapping
from typing import Any

from scala_cli.errors import CheckpointError

INTERPOLATION = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""timm's names of Pillow's filters, in the order of Pillow's numbers."""
CROP_MODES = ("center", "squash", "border")
RGB = 3
FLOAT32 = 3.4e38
"""About the largest float32; comparing NaN with it gives False."""


def checked(
    cfg: Mapping[str, Any],
    channels: int,
    classes: Any,
    origin: object,
    hint: str = "Mend it, or leave it out.",
) -> dict[str, Any]:
    """Returns the settings that are not None; a single number for RGB becomes three.

    Args:
        channels: input channels of the model. Three values are always accepted, as timm keeps those for RGB
            in the settings of a model with another number of channels.
        classes: classes of its head; 0 or None if unknown, or if there is no head.
        origin: the file, for messages.

    Raises CheckpointError, naming `origin` and the setting, for an invalid setting.
    """
    cfg = {name: value for name, value in cfg.items() if value is not None}
    flaws = {
        "mean": not is_of_channels(cfg.get("mean", [0]), channels),
        "std": not is_of_channels(cfg.get("std", [1]), channels) or min(cfg.get("std", [1])) <= 0,
        "crop_pct": not is_number(cfg.get("crop_pct", 1)) or cfg.get("crop_pct", 1) <= 0,
        "interpolation": cfg.get("interpolation", "bicubic") not in INTERPOLATION,
        "crop_mode": cfg.get("crop_mode", "center") not in CROP_MODES,
        "label_names": not is_of_classes(cfg.get("label_names", []), classes),
    }
    wanted = {
        "mean": f"{channels} numbers",
        "std": f"{channels} numbers above 0",
        "crop_pct": "a number above 0",
        "interpolation": f"one of {', '.join(INTERPOLATION)}",
        "crop_mode": f"one of {', '.join(CROP_MODES)}",
        "label_names": f"a list of {classes or 'the'} names",
    }
    for name in [name for name, flawed in flaws.items() if flawed]:
        value = repr(cfg[name])
        value = value if len(value) <= 60 else f"{value[:57]}..."
        raise CheckpointError(f"{origin} is damaged: {name} is {value}, not {wanted[name]}.", hint)
    alone = [name for name in ("mean", "std") if len(cfg.get(name, ())) == 1 and channels == RGB]
    return {**cfg, **{name: list(cfg[name]) * RGB for name in alone}}


def is_number(value: Any) -> bool:
    """Returns whether a value of a foreign file is a number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FLOAT32


def is_of_channels(values: Any, channels: int) -> bool:
    """Whether these are finite numbers: one for each channel, one for all, or three for RGB."""
    return (
        isinstance(values, list | tuple) and len(values) in (1, channels, RGB) and all(map(is_number, values))
    )


def is_of_classes(names: Any, classes: Any) -> bool:
    """Whether these are names of `classes` classes (any number if unknown), or no names at all."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return False
    return not names or not classes or len(names) == classes
