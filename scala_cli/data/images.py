"""Opens image files, and converts their pixels to 8-bit RGB."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

NOT_READ = {"EPS", "WMF", "MPEG", "FLI", "FITS", "BUFR", "GRIB", "HDF5", "IPTC"}
"""Formats that are not read: they hold no photographs, or Pillow needs another program to read them."""

SIXTEEN_BITS = {"PNG", "PPM"}
"""Formats whose 32-bit integers hold 16 bits."""


@cache
def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the installed formats that are read."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of files that are read, in lower case with the dot."""
    known = {*formats(), "MPO"}  # Pillow opens MPO files as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def open_image(file: "str | IO[bytes]") -> Image.Image:
    """Opens an image file in one of the `formats`. Raises as `Image.open`."""
    return Image.open(file, formats=formats())


def as_rgb(image: Image.Image, upright: bool) -> Image.Image:
    """Returns an image as 8-bit RGB, as timm does, but scales pixels of more bits instead of clipping them.

    Transparency is dropped; only the first of several frames is used.

    Args:
        upright: rotate it as its EXIF data says. Pillow always does so for TIFF files.

    Raises:
        ValueError: pixel values of unknown range. Other errors are Pillow's, for a broken file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata and palettes, which are not used
        image.load()
        if upright:
            with suppress(Exception):  # broken metadata says nothing about the pixels
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
            image = Image.fromarray(high_bits(np.asarray(image), getattr(image, "tag_v2", {})))
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floats"
            raise ValueError(f"its pixels are {kind} of unknown range; save it with 8 or 16 bits")
        return image.convert("RGB")


def high_bits(pixels: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Returns the upper 8 bits of each pixel, as Pillow does for 16-bit colours.

    Args:
        pixels: integers from 0 to 65535, or of fewer bits if `tags` say so.
        tags: a TIFF file's tags.
    """
    upper = (pixels >> (tags.get(Base.BitsPerSample, (16,))[0] - 8)).astype(np.uint8)
    return 255 - upper if tags.get(Base.PhotometricInterpretation) == 0 else upper  # white is zero
