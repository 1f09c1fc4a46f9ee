"""Parts of a data set: its images and their classes."""

import sys
from array import array
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from PIL import Image
from timm.data import create_dataset

from scala_cli.data.classes import natural_order, same_classes, spelled
from scala_cli.data.folder import class_folders, counted, is_image, read_folder, read_images, suffix, visible
from scala_cli.data.images import open_image
from scala_cli.data.samples import FromDataset, FromReader, Renumbered, Samples, Some
from scala_cli.data.shards import TAR, is_shards, read_shards, shards_named
from scala_cli.errors import DataError, ScalaError
from scala_cli.watch import Watcher

VALIDATION = ("val", "validation", "valid", "test")
"""Folders that may hold validation images; the first that exists is used."""
LOOKED_AT = 16
"""Number of images, spread evenly, that are opened to check their size."""


@dataclass(frozen=True)
class Split:
    """One part of a data set, and notes for the user on how it was read."""

    samples: Samples
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def tell(self, watch: Watcher) -> None:
        """Passes these notes to `watch`."""
        for note in self.notes:
            watch.note(note)

    def tell_enlarged(self, size: int, watch: Watcher) -> None:
        """Notes if images are smaller than `size` pixels a side; checks LOOKED_AT of them."""
        some, sides = evenly(self, LOOKED_AT).samples, []
        for number in range(len(some)):
            with suppress(ScalaError, OSError):
                sides.append(min(some[number][0].size))
        small = [side for side in sides if side < size]
        if small:
            watch.note(
                f"{len(small)} of {len(sides)} images looked at are smaller than {size} pixels "
                f"(the smallest {min(small)}): they are enlarged."
            )

    def numbered_as(self, names: Sequence[str] | None) -> "Split":
        """Returns the same images, with classes numbered like a model's if the names are the same."""
        if names is None or spelled(names) == self.classes or not same_classes(names, self.classes):
            return self
        return self.renumbered(spelled(names))

    def renumbered(self, classes: Sequence[str]) -> "Split":
        """Returns the same images, each class numbered by its position in `classes`."""
        if tuple(classes) == self.classes:
            return self
        place = {name: number for number, name in enumerate(classes)}
        numbers = [place[name] for name in self.classes]
        return replace(self, samples=Renumbered(self.samples, numbers), classes=tuple(classes))


def open_split(
    data: str, training: bool, data_dir: str | None = None, classes: Sequence[str] | None = None
) -> Split:
    """Returns the training or validation part of a data set.

    Args:
        data: a folder with train/ and val/ (or validation/, valid/, test/) of class folders or of tar files
            with class numbers; `digits`, scikit-learn's handwritten digits; a timm data set name such as
            torch/cifar10; or, for training, tar files such as a/{000..010}.tar.
        data_dir: the directory of a named data set.
        classes: those of the training part, if it is already open.

    Raises:
        DataError: missing or empty folders, a class without images, classes that differ between parts.
    """
    refuse_unknown(data, data_dir)
    if data == "digits":
        return digits(training)
    if is_shards(data):
        if not training:
            raise DataError(f"{data} has no validation part.", remedy="hold_out")
        return labelled_shards(shards_named(data), data)
    folder = Path(data).expanduser()
    return open_folder(folder, training, classes) if folder.is_dir() else open_named(data, training, data_dir)


def open_images(data: str, data_dir: str | None = None) -> Split:
    """Returns all images, to be used without labels.

    Args:
        data: as for `open_split` (its training part), or any folder of images, flat or nested, or of tar
            files.

    Raises DataError if there are none.
    """
    if is_shards(data):
        return of_shards(shards_named(data), data)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return open_split(data, True, data_dir)
    return images_in(folder / "train" if (folder / "train").is_dir() else folder)


def open_validation_images(data: str, data_dir: str | None = None) -> Split | None:
    """Returns the images of the validation part, to be used without labels; None if there are no parts.

    Args:
        data: as for `open_images`.

    Raises DataError if that part holds no images.
    """
    if is_shards(data):
        return None
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return open_split(data, False, data_dir)
    parts = [folder / name for name in VALIDATION if (folder / name).is_dir()]
    return images_in(parts[0]) if parts and (folder / "train").is_dir() else None


def of_folder(folder: Path) -> Split:
    """Returns the images of a folder of class folders. Raises as `read_folder`."""
    found = read_folder(folder)
    return Split(found, found.classes, passed_over(folder, found.others))


def images_in(folder: Path) -> Split:
    """Returns all images of a folder and its subfolders, or of its tar files.

    Raises DataError if there are none.
    """
    if tars := tars_in(folder):
        return of_shards(tars, folder)
    found = read_images(folder)
    return Split(found, (), passed_over(folder, found.others))


def of_shards(files: Sequence[Path], origin: object) -> Split:
    """Returns all images of tar files. Raises DataError if there are none."""
    found = read_shards(files)
    return Split(found, found.classes, passed_over(origin, found.others))


def labelled_shards(files: Sequence[Path], origin: object) -> Split:
    """Returns all images of tar files. Raises DataError if there are none, or one has no class."""
    split = of_shards(files, origin)
    if not split.classes:
        raise DataError(f"{origin}: not every image has a class.", "Write its number beside it: 0001.cls")
    return split


def tars_in(folder: Path) -> list[Path]:
    """Returns the tar files of a folder in natural order; none if it also holds images or folders."""
    tars = []
    for entry in visible(folder):
        if entry.is_dir() or is_image(entry):
            return []
        if suffix(entry.name) == TAR:
            tars.append(Path(entry.path))
    return sorted(tars, key=lambda path: natural_order(path.name))


def passed_over(origin: object, others: Mapping[str, int]) -> tuple[str, ...]:
    """Returns a note on the files that are not read, if there are any."""
    told = f"{origin}: skipped files of kinds that are not read: {counted(others)}."
    return (told,) if others else ()


def refuse_unknown(data: str, data_dir: str | None = None) -> None:
    """Raises DataError unless `data` names a folder, tar files or a data set; reads no images."""
    kind, _, name = data.partition("/")
    if is_shards(data):
        shards_named(data)
        return
    if data == "digits" or Path(data).expanduser().is_dir():
        return
    if kind == "torch" and name and data_dir is None:
        raise DataError(f"{data} needs the directory of its files.", remedy="data_dir")
    if kind in ("torch", "hfds") and name:
        return
    if kind in ("wds", "tfds") and name:
        raise DataError(
            f"{data}: streamed data sets cannot be counted exactly, so they are not read.",
            "Give the images as a folder with train/ and val/.",
            remedy="tar_files",
        )
    raise DataError(
        f"data {data!r}: there is no such folder, and no data set of that name.", remedy="known_data"
    )


def open_folder(folder: Path, training: bool, classes: Sequence[str] | None = None) -> Split:
    """Returns one part of a folder of class folders or of tar files, with classes numbered as in train/."""
    present = [folder / name for name in VALIDATION if (folder / name).is_dir()]
    train = folder / "train"
    if (training and not train.is_dir()) or (not training and not present):
        wanted = "train/" if training else "val/, validation/, valid/ or test/"
        raise DataError(f"{folder} has no {wanted}.", "Put one folder per class under train/ and under val/.")
    part = train if training else present[0]
    tars = tars_in(part)
    found = labelled_shards(tars, part) if tars else of_folder(part)
    notes = [*found.notes]
    if part.name == "test":
        notes.append(f"{folder} has no val/, so test/ takes its place; in training it also chooses best/.")
    split = replace(found, notes=tuple(notes))
    if classes is None and not training and train.is_dir():
        shards = tars_in(train)
        classes = labelled_shards(shards, train).classes if shards else [*class_folders(train)]
    unknown = [name for name in found.classes if classes is not None and name not in classes]
    if unknown:
        raise DataError(
            f"{part} has a class {unknown[0]!r} that train/ does not have.",
            "Give both parts the same classes.",
        )
    return split if classes is None else split.renumbered(classes)


def open_named(name: str, training: bool, data_dir: str | None) -> Split:
    """Returns one part of a data set that timm knows by name. Raises DataError if it is not in `data_dir`."""
    split = "train" if training else "validation"
    try:
        with redirect_stdout(sys.stderr):  # timm prints what is not installed
            dataset = create_dataset(name, data_dir, split=split, is_training=training)
    except (AssertionError, RuntimeError, OSError, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160] or "not found"
        where = name if data_dir is None else f"{name} in {data_dir}"
        raise DataError(f"{where}: {reason}.", remedy="data_dir") from None
    if hasattr(dataset, "loader"):
        dataset.loader = open_image  # torchvision's own clips values beyond 8 bits
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
    """Returns scikit-learn's 1,797 handwritten digits, 8 x 8 pixels; every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits needs scikit-learn.", "pip install scikit-learn") from None
    bunch = load_digits()
    chosen = [i for i in range(len(bunch.target)) if (i % 5 != 0) == training]
    pixels = (bunch.images[chosen] * (255 / 16)).astype("uint8")
    pairs = [*zip(map(Image.fromarray, pixels), map(int, bunch.target[chosen]), strict=True)]
    return Split(FromDataset(pairs, "digits"), tuple(map(str, range(10))))


def evenly(split: Split, count: int) -> Split:
    """Returns `count` images spread evenly over a split, or all if it has fewer."""
    count = min(count, len(split))
    return replace(split, samples=Some(split.samples, [n * len(split) // count for n in range(count)]))


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """Returns the training images that are kept, and an evenly spread share that is held out."""
    exact = Fraction(share).limit_denominator(10_000)
    held, kept = array("q"), array("q")  # there may be millions
    for number in range(len(split)):
        (held if int((number + 1) * exact) > int(number * exact) else kept).append(number)
    if not held:
        raise DataError(
            f"{len(split)} images are too few to hold out {share:g} of them.", remedy="larger_holdout"
        )
    return replace(split, samples=Some(split.samples, kept)), Split(Some(split.samples, held), split.classes)
