"""Conversion of pixels to 8-bit RGB, and rotation by EXIF data."""

import shutil
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from runs import loader, settings

from scala_cli.data.images import as_rgb, formats, open_image
from scala_cli.data.split import open_split
from scala_cli.errors import DataError
from scala_cli.settings import ReadSettings, Settings

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112


def read(file, upright=True) -> np.ndarray:
    return np.asarray(as_rgb(open_image(str(file)), upright))


@pytest.mark.parametrize("kind", ["png", "tif", "jp2", "pgm"])
def test_16_bit_grey_equals_8_bit_grey(tmp_path, kind):
    """Clipping would turn everything but black white."""
    file = tmp_path / f"grey.{kind}"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(file)
    assert open_image(str(file)).mode in ("I;16", "I")
    assert (read(file) == GREY[..., None]).all()


def test_16_bits_through_torchvisions_folders(folder):
    for file in (folder / "train/blue").iterdir():
        Image.fromarray(GREY.astype(np.uint16) * 257).save(file)
    image, _ = open_split("torch/image_folder", True, str(folder)).samples[0]
    assert (np.asarray(as_rgb(image, upright=True)) == GREY[..., None]).all()


def test_16_bits_in_big_endian_order(tmp_path):
    pixels = Image.frombytes("I;16B", (16, 16), (GREY.astype(">u2") * 257).tobytes())
    pixels.save(tmp_path / "big.tif")
    assert open_image(str(tmp_path / "big.tif")).mode == "I;16B"
    assert (read(tmp_path / "big.tif") == GREY[..., None]).all()


def test_tiff_where_white_is_zero_and_of_12_bits(tmp_path):
    file = tmp_path / "grey.tif"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(file, tiffinfo={262: 0})
    assert (read(file) == 255 - GREY[..., None]).all()
    Image.fromarray(np.full((16, 16), 0x7777, np.uint16)).save(file)
    written = file.read_bytes()
    bits = b"\x02\x01\x03\x00\x01\x00\x00\x00"  # the TIFF tag BitsPerSample, one short value
    assert bits + b"\x10" in written
    file.write_bytes(written.replace(bits + b"\x10", bits + b"\x0c"))
    assert (read(file) == 0x77).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pixels_of_unknown_range_are_refused(folder, dtype, kind):
    Image.fromarray(GREY.astype(dtype)).save(folder / "val/red/9.tif")
    with pytest.raises(DataError, match=rf"red/9\.tif cannot be read \(its pixels are {kind}"):
        list(loader(folder))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pixels_of_8_bits_are_read_as_timm_reads_them(mode):
    """Transparency is dropped, not blended with a colour, and no warning is shown."""
    colours = Image.fromarray(np.dstack([GREY, GREY.T, GREY[::-1]]))
    image = colours if mode == "LAB" else colours.convert("RGBA" if mode == "PA" else mode.replace("PA", "P"))
    if mode == "LAB":
        image = Image.merge("LAB", colours.split())
    if mode == "PA":
        image = colours.convert("P").convert("PA")
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = as_rgb(image.copy(), upright=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.mode == "RGB" and ours.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_photographs_are_turned_upright_unless_told_not_to(tmp_path, kind):
    """A photograph taken with the phone held sideways is stored rotated by 90 degrees."""
    upright, file = np.zeros((32, 16, 3), np.uint8), tmp_path / f"photo.{kind}"
    upright[:16] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.rot90(upright)).save(file, exif=exif)
    difference = read(file).astype(int) - upright
    assert difference.shape == upright.shape and abs(difference).mean() < 5
    if kind != "tif":  # Pillow rotates these by itself
        assert read(file, upright=False).shape == (16, 32, 3)


def test_sixteen_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "grey.png", exif=exif)
    assert (read(tmp_path / "grey.png") == GREY[::-1, ::-1, None]).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_broken_exif_data_is_no_broken_image(tmp_path, exif, recwarn):
    Image.fromarray(GREY).save(tmp_path / "photo.png", exif=exif)
    assert (read(tmp_path / "photo.png") == GREY[..., None]).all() and not recwarn.list


def test_the_loader_turns_as_it_is_told(folder):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255
    for part in ("train", "val"):
        for file in (folder / part).rglob("*.png"):
            Image.fromarray(half).save(file, exif=exif)
    for chosen, brighter in ((True, "below"), (False, "above")):
        for training in (True, False):
            images, _ = next(iter(loader(folder, training, exif=chosen)))
            above, below = images[:, :, :6].mean(), images[:, :, -6:].mean()
            assert ("above" if above > below else "below") == brighter


def test_a_run_keeps_whether_it_turns_photographs():
    chosen = replace(settings("photos"), read=ReadSettings(exif=False, workers=7))
    assert Settings.of(asdict(chosen), {"workers": 0}).read == ReadSettings(exif=False, workers=0)
    words = chosen.words()
    assert "--no-exif" in words and "--workers" not in words


def test_a_file_name_does_not_make_other_programs_run(folder):
    """Pillow would run Ghostscript for a PostScript file, whatever its suffix."""
    assert "EPS" not in formats() and {"JPEG", "PNG", "TIFF", "GIF", "WEBP"} <= {*formats()}
    Image.new("RGB", (20, 20)).save(folder / "page.eps")
    shutil.move(folder / "page.eps", folder / "val/red/9.jpg")
    with pytest.raises(DataError, match=r"red/9\.jpg cannot be read \(no image\)"):
        list(loader(folder))
