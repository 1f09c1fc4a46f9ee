"""Lists the images of a folder of class folders, once."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from scala_cli.data.classes import natural_order, spelled
from scala_cli.data.images import open_image, suffixes
from scala_cli.errors import DataError

JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
"""Names, in lower case, of files that systems leave beside images; ignored like hidden files."""


@dataclass
class Folder:
    """The images of a folder of class folders: class by class, each in natural order.

    Args:
        classes: the names of the classes, in natural order.
        directories: the folder of each class.
        names: the image file names of each class.
        others: number of skipped files, by suffix.
    """

    classes: tuple[str, ...]
    directories: Sequence[str]
    names: Sequence[Sequence[str]]
    others: Mapping[str, int]
    starts: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(map(len, self.names))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.find(index)
        return open_image(path), target

    def name(self, index: int) -> str:
        """Returns the path of an image, with undecodable bytes escaped."""
        return os.fsencode(self.find(index)[0]).decode(errors="backslashreplace")

    def find(self, index: int) -> tuple[str, int]:
        """Returns the path of an image and the number of its class."""
        number = bisect_right(self.starts, index) - 1
        name = self.names[number][index - self.starts[number]]
        return f"{self.directories[number]}{os.sep}{name}", number


def read_folder(folder: Path) -> Folder:
    """Returns the images of a folder of class folders.

    Raises:
        DataError: images outside a class folder or in a subfolder of one, or a class without images. Other
            errors as for `class_folders`.
    """
    directories = class_folders(folder)
    if any(is_image(entry) for entry in visible(folder) if not entry.is_dir()):
        raise DataError(f"{folder} holds images that are in no class folder.", "Move them to their classes.")
    names: list[list[str]] = []
    others: Counter[str] = Counter()
    for label, directory in directories.items():
        images, passed = [], Counter[str]()
        for entry in visible(directory):
            if entry.is_dir():
                refuse_images_in(Path(entry.path), folder)
            elif is_image(entry):
                images.append(entry.name)
            else:
                passed[suffix(entry.name)] += 1
        if not images:
            instead = f", but {counted(passed)}" if passed else ""
            raise DataError(
                f"class {label!r} has no images in {directory}{instead}.",
                "Add images such as .jpg, .png, .webp or .tif, or remove the folder.",
            )
        names.append(sorted(images, key=natural_order))
        others += passed
    return Folder(tuple(directories), [*map(str, directories.values())], names, others)


def read_images(folder: Path) -> Folder:
    """Returns all images of a folder and its subfolders; each folder counts as a class.

    Raises DataError if there is none.
    """
    directories: list[str] = []
    names: list[list[str]] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()  # a link may lead back to a parent folder
    left = [folder]
    while left:
        directory = left.pop()
        place = directory.stat()
        if (place.st_dev, place.st_ino) in seen:
            continue
        seen.add((place.st_dev, place.st_ino))
        images, deeper = [], []
        for entry in visible(directory):
            if entry.is_dir():
                deeper.append(Path(entry.path))
            elif is_image(entry):
                images.append(entry.name)
            else:
                others[suffix(entry.name)] += 1
        left += sorted(deeper, key=lambda path: natural_order(path.name), reverse=True)
        if images:
            directories.append(str(directory))
            names.append(sorted(images, key=natural_order))
    if not names:
        instead = f", but {counted(others)}" if others else ""
        raise DataError(
            f"{folder} holds no images{instead}.", "Add images such as .jpg, .png, .webp or .tif."
        )
    return Folder(tuple(directories), directories, names, others)


def class_folders(folder: Path) -> dict[str, Path]:
    """Returns the class folders by name, in natural order, the same in every process.

    Raises DataError if there is none, if a name cannot be decoded, or if two spellings name one class.
    """
    found: dict[str, Path] = {}
    for entry in visible(folder):
        if not entry.is_dir():
            continue
        (label,), path = spelled([entry.name]), Path(entry.path)
        if label in found:
            twice = " and ".join(sorted(ascii(each.name) for each in (path, found[label])))
            raise DataError(
                f"{folder} spells class {label!r} in two ways, {twice}: composed and decomposed accents.",
                "Move all of its images to one of the two folders.",
            )
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{folder} has a folder whose name is not in UTF-8: {label!a}.", "Rename it."
            ) from None
        found[label] = path
    if not found:
        raise DataError(f"{folder} has no class folders.", "Put one folder of images per class in it.")
    return {label: found[label] for label in sorted(found, key=natural_order)}


def visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a folder, except hidden ones and junk."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.name.lower() not in JUNK:
                yield entry


def refuse_images_in(folder: Path, top: Path) -> None:
    """Raises DataError if a subfolder of a class folder holds images, at any depth."""
    for entry in visible(folder):
        if entry.is_dir(follow_symlinks=False):
            refuse_images_in(Path(entry.path), top)
        elif is_image(entry):
            raise DataError(
                f"{top} has images deeper than its class folders, in '{folder.relative_to(top)}'.",
                "Put the images of a class directly into its folder.",
            )


def suffix(name: str) -> str:
    """Returns the suffix of a file name in lower case, with the dot; empty if it has none."""
    return "".join(name.lower().rpartition(".")[1:]) if "." in name else ""


def is_image(entry: os.DirEntry[str]) -> bool:
    """Returns whether Pillow reads files with this suffix."""
    return suffix(entry.name) in suffixes()


def counted(others: Mapping[str, int]) -> str:
    """Returns counts as text, most frequent first: "3 .heic, 1 .txt"."""
    frequent = sorted(others.items(), key=lambda each: (-each[1], each[0]))
    listed = [f"{count} {end or 'without a suffix'}" for end, count in frequent[:5]]
    return ", ".join([*listed, *(["and more"] if len(frequent) > 5 else [])])
