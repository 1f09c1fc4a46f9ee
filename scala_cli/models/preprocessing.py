"""Converts transformers' image preprocessing (preprocessor_config.json) to timm's settings."""

import math
from collections.abc import Mapping
from typing import Any

from scala_cli.errors import CheckpointError
from scala_cli.models.inputs import INTERPOLATION, checked

HALF = [0.5, 0.5, 0.5]
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {"resample": 2, "size": 224, "do_center_crop": False},
    "DeiT": {"resample": 3, "size": 256, "do_center_crop": True, "crop_size": 224},
}
"""Defaults of transformers for missing settings, by the prefix of the processor's name."""

Size = tuple[int, int]
"""(height, width)"""


def timm_settings(
    processor: Mapping[str, Any], image: Size, origin: object, channels: int = 3
) -> tuple[dict[str, Any], list[str]]:
    """Returns timm's mean, std, interpolation, crop_pct and crop_mode, and notes on what timm does otherwise.

    Args:
        processor: the content of preprocessor_config.json.
        image: input size of the model in pixels.
        origin: the file, for messages.
        channels: input channels of the model.

    Raises CheckpointError for a setting of the wrong type.
    """
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type", "ViT"))
    of_kind = DEFAULTS["DeiT" if str(kind).startswith("DeiT") else "ViT"]
    seen = {"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255, **of_kind, **processor}
    try:
        settings = {
            **pixels(seen),
            "interpolation": INTERPOLATION[range(len(INTERPOLATION)).index(seen["resample"])],
        }
        geometry, notes = crop(seen, image)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{origin} cannot be read: {error!r}.", "Leave that file out.") from None
    settings = checked(settings | geometry, channels, None, origin, "Mend it, or leave that file out.")
    return settings, [f"{origin}: {note}" for note in notes]


def pixels(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns mean and std for pixels in 0 to 1, timm's scale; transformers may use another scale."""
    scale = 255 * seen["rescale_factor"] if seen.get("do_rescale", True) else 255
    mean, std = (
        (seen["image_mean"], seen["image_std"]) if seen.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    )
    exact = math.isclose(scale, 1)
    mean, std = ([float(value) if exact else value / scale for value in values] for values in (mean, std))
    return {"mean": mean, "std": std}


def crop(seen: Mapping[str, Any], image: Size) -> tuple[dict[str, Any], list[str]]:
    """Returns timm's resize and crop settings, and notes. With odd margins its crop may be one pixel off."""
    if not seen.get("do_resize", True):
        return {}, ["pictures are not resized there, but are here; give them the model's size"]
    mode, height, width = resized(seen["size"])
    notes = []
    cut = resized(seen["crop_size"])[1:] if seen.get("do_center_crop") else (height, width)
    if cut != image:
        notes.append(
            f"pictures of {cut[0]} x {cut[1]} pixels are made there, the model takes {image[0]} x {image[1]}"
        )
    if mode == "center" and not seen.get("do_center_crop"):
        notes.append("pictures keep their shape there; here what is longer is cut off")
    shares = [kept(cut[0], height), kept(cut[1], width)]
    if [math.floor(c / shares[0]) for c in cut] != [height, width]:
        notes.append(
            f"{height} x {width} pixels are cut to {cut[0]} x {cut[1]} there, which timm does not do alike"
        )
    return {"crop_mode": mode, "crop_pct": shares[0]}, notes


def resized(size: Any) -> tuple[str, int, int]:
    """Returns (timm's crop mode, height, width) of a size: 224, {"height", "width"} or {"shortest_edge"}."""
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return "center", int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, Mapping):
        return "squash", int(size["height"]), int(size["width"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return "squash", int(height), int(width)


def kept(cut: int, whole: int) -> float:
    """Returns the crop_pct for which timm's resize, floor(cut / crop_pct), equals `whole`."""
    share = cut / whole
    return share if math.floor(cut / share) == whole else cut / (whole + 0.5)
