"""Parts of a data set: which images there are, and of which class."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from timm.data import add_img_extensions, create_dataset, get_img_extensions
from timm.data.readers import create_reader

from scala_cli.errors import DataError

VALIDATION = ("val", "validation", "test")
add_img_extensions((".webp", ".bmp"))  # timm's folder reader would pass over these in silence


class Samples(Protocol):
    """Raw images with class numbers, before any transform."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    samples: Samples
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)


def open_split(
    data: str, training: bool, data_dir: str | None = None, classes: Sequence[str] | None = None
) -> Split:
    """The training or validation part of a data set.

    Args:
        data: a folder with train/ and val/ (or validation/, test/) of class folders; `digits`,
            scikit-learn's handwritten digits; or a timm data set name such as torch/cifar10.
        data_dir: where the named data set lies.
        classes: those of the training part, where it is open already; a folder is then not read twice.

    Raises:
        DataError: missing or empty folders, a class without images, classes that differ between parts.
    """
    refuse_unknown(data, data_dir)
    if data == "digits":
        return digits(training)
    folder = Path(data).expanduser()
    return open_folder(folder, training, classes) if folder.is_dir() else open_named(data, training, data_dir)


def refuse_unknown(data: str, data_dir: str | None = None) -> None:
    """Raises DataError for what is neither a folder nor the name of a data set; reads nothing yet."""
    kind, _, name = data.partition("/")
    if data == "digits" or Path(data).expanduser().is_dir():
        return
    if kind == "torch" and name and data_dir is None:
        raise DataError(f"{data} needs to know where its files lie.", "Name the place: --data-dir DIR")
    if kind in ("torch", "hfds") and name:
        return
    if kind in ("wds", "tfds") and name:
        raise DataError(
            f"{data}: streamed data sets cannot be counted exactly, so they are not read.",
            "Give the images as a folder with train/ and val/.",
        )
    raise DataError(
        f"data {data!r}: there is no such folder, and no data set of that name.",
        "Give a folder with train/ and val/ of class folders, torch/cifar10 with --data-dir, or digits.",
    )


def open_folder(folder: Path, training: bool, classes: Sequence[str] | None = None) -> Split:
    """One part of a folder of class folders. Both parts count classes as train/ does."""
    present = [folder / name for name in VALIDATION if (folder / name).is_dir()]
    train = folder / "train"
    if (training and not train.is_dir()) or (not training and not present):
        wanted = "train/" if training else "val/, validation/ or test/"
        raise DataError(f"{folder} has no {wanted}.", "Put one folder a class under train/ and under val/.")
    if training:
        return read_folder(train)
    if classes is None and train.is_dir():
        classes = read_folder(train).classes
    return read_folder(present[0], classes)


def read_folder(folder: Path, classes: Sequence[str] | None = None) -> Split:
    """The images of one folder of class folders; with `classes`, numbered as these."""
    directories = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not directories:
        raise DataError(f"{folder} has no class folders.", "Put one folder of images a class in it.")
    for directory in directories:
        if not any(path.suffix.lower() in get_img_extensions(as_set=True) for path in directory.rglob("*")):
            raise DataError(
                f"class {directory.name!r} has no images in {directory}.",
                "Add .jpg, .png, .webp or .bmp images, or remove the folder.",
            )
    reader = create_reader("", str(folder))
    found = tuple(reader.class_to_idx)
    if "" in found:
        raise DataError(f"{folder} holds images that are in no class folder.", "Move them to their classes.")
    odd = set(found) - {directory.name for directory in directories}
    if odd:
        raise DataError(
            f"{folder} has images deeper than its class folders, in {sorted(odd)[0]!r}.",
            "Put the images of a class right into its folder.",
        )
    if classes is None or found == tuple(classes):
        return Split(FromReader(reader), found)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has a class {unknown[0]!r} that train/ does not have.",
            "Give both parts the same class folders.",
        )
    numbered = {name: number for number, name in enumerate(classes)}
    return Split(FromReader(create_reader("", str(folder), class_map=numbered)), tuple(classes))


def open_named(name: str, training: bool, data_dir: str | None) -> Split:
    """A data set timm knows by name. Raises DataError where it does not lie in `data_dir`."""
    split = "train" if training else "validation"
    try:
        with redirect_stdout(sys.stderr):  # timm prints there what is not installed
            dataset = create_dataset(name, data_dir, split=split, is_training=training)
    except (AssertionError, RuntimeError, OSError, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160] or "not found"
        raise DataError(
            f"{name} in {data_dir or 'no --data-dir'}: {reason}.", "Name its place: --data-dir DIR"
        ) from None
    samples = FromReader(dataset.reader) if hasattr(dataset, "reader") else FromDataset(dataset, name)
    classes = getattr(dataset, "classes", None)
    if classes is None and hasattr(dataset, "reader"):
        classes = getattr(dataset.reader, "class_to_idx", None)
    if not classes:
        raise DataError(
            f"{name} does not name its classes.", "Give the images as a folder with train/ and val/."
        )
    return Split(samples, tuple(map(str, classes)))


def digits(training: bool) -> Split:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: every fifth for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits needs scikit-learn.", "pip install scikit-learn") from None
    bunch = load_digits()
    chosen = [i for i in range(len(bunch.target)) if (i % 5 != 0) == training]
    pixels = (bunch.images[chosen] * (255 / 16)).astype("uint8")
    pairs = [*zip(map(Image.fromarray, pixels), map(int, bunch.target[chosen]), strict=True)]
    return Split(FromDataset(pairs, "digits"), tuple(map(str, range(10))))


class FromReader:
    """The samples of a timm reader: folders and hfds."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target = self.reader[index][:2]
        return Image.open(file), target

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or f"image {index}"  # which may lie in a table


class FromDataset:
    """The samples of what opens its images itself, as torchvision's data sets do."""

    def __init__(self, dataset: Any, label: str) -> None:
        self.dataset, self.label = dataset, label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"


def class_misfit(data: Sequence[str], num_classes: int, names: Sequence[str] | None) -> str:
    """Why a model's classes cannot be the data's; empty where they can."""
    if len(data) != num_classes:
        return f"the model knows {num_classes} classes, the data has {len(data)}"
    if names and tuple(names) != tuple(data):
        theirs, ours = next((a, b) for a, b in zip(names, data, strict=True) if a != b)
        return f"class {theirs!r} of the model is {ours!r} in the data"
    return ""


class Some:
    """Some of other samples, by their numbers."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self.samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[self.numbers[index]]

    def name(self, index: int) -> str:
        return self.samples.name(self.numbers[index])


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """The training images without a share of them, and that share, spread evenly."""
    exact = Fraction(share).limit_denominator(10_000)
    numbers = range(len(split))
    held = [number for number in numbers if int((number + 1) * exact) > int(number * exact)]
    kept = sorted({*numbers} - {*held})
    if not held:
        raise DataError(
            f"{len(split)} images are too few to hold out {share:g} of them.",
            "Give more images, or a larger --holdout.",
        )
    return Split(Some(split.samples, kept), split.classes), Split(Some(split.samples, held), split.classes)
