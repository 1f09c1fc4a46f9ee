"""Reads tar files of images, as webdataset writes them, in any order.

webdataset streams such files and shuffles only a buffer. Here the position of every image is listed once, so
tar files are shuffled, counted, held out and resumed exactly like folders.
"""

import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from scala_cli.data.classes import natural_order
from scala_cli.data.images import open_image, suffixes
from scala_cli.errors import DataError

TAR = ".tar"
CLASS = ".cls"
"""Suffix of the member that holds the class number of the image of the same name."""


class Member(NamedTuple):
    """An image in a tar file: its name, its offset and length in bytes, and its class if known."""

    name: str
    first: int
    length: int
    label: str | None


@dataclass
class Shards:
    """The images of some tar files: file by file, in the order within each file.

    Args:
        files: the tar files.
        names: the names of the images in each file.
        firsts, lengths: each image's offset in its file and its length, in bytes.
        labels: each image's class, as an index into `classes`.
        classes: the class names in natural order; empty unless every image has one.
        others: number of skipped members, by suffix.
    """

    files: Sequence[Path]
    names: Sequence[Sequence[str]]
    firsts: Sequence[int]
    lengths: Sequence[int]
    labels: Sequence[int]
    classes: tuple[str, ...]
    others: Mapping[str, int]
    starts: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(map(len, self.names))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with self.files[self.file_of(index)].open("rb") as file:
            file.seek(self.firsts[index])
            image = open_image(BytesIO(file.read(self.lengths[index])))
        return image, self.labels[index] if self.classes else 0

    def name(self, index: int) -> str:
        """Returns the path of the tar file and the name of the image in it."""
        number = self.file_of(index)
        member = self.names[number][index - self.starts[number]]
        return os.fsencode(self.files[number] / member).decode(errors="backslashreplace")

    def file_of(self, index: int) -> int:
        """Returns the number of the file that holds an image."""
        return bisect_right(self.starts, index) - 1


def read_shards(files: Sequence[Path]) -> Shards:
    """Lists the images of tar files, and their classes if every image has one.

    Raises DataError if a file is not a readable tar file, holds two images of the same name or a class that
    is not a number, or if there are no images.
    """
    names: list[list[str]] = []
    firsts, lengths = array("q"), array("q")
    labels: list[str | None] = []
    others: Counter[str] = Counter()
    for file in files:
        members = list_shard(file, others)
        names.append([member.name for member in members])
        firsts.extend(member.first for member in members)
        lengths.extend(member.length for member in members)
        labels += [member.label for member in members]
    if not labels:
        where = files[0] if len(files) == 1 else f"{files[0]} to {files[-1].name}"
        raise DataError(f"{where}: no images.", "Give tar files of images such as .jpg, .png or .webp.")
    known = [label for label in labels if label is not None]
    classes = sorted({*known}, key=natural_order) if len(known) == len(labels) else []
    numbers = {name: number for number, name in enumerate(classes)}
    told = array("q", (numbers[label] for label in known)) if classes else array("q")
    return Shards(files, names, firsts, lengths, told, tuple(classes), others)


def list_shard(file: Path, others: Counter[str]) -> list[Member]:
    """Returns the images of one tar file, and counts its other members in `others` by suffix.

    Raises as `read_shards`.
    """
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # type: ignore[attr-defined]  # there may be too many to hold
                place, _, base = member.name.rpartition("/")
                stem, dot, end = base.partition(".")  # up to the first dot, as webdataset does
                key, suffix = f"{place}/{stem}", f"{dot}{end}".lower()
                if not member.isreg() or not stem:
                    continue
                if suffix == CLASS:
                    labels[key] = class_number(tar.extractfile(member), file, member.name)
                elif suffix not in suffixes():
                    others[suffix] += 1
                elif key in images:
                    raise DataError(
                        f"{file} holds two images of the same name, {images[key].name} and {member.name}.",
                        "Rename one of them, or leave it out.",
                    )
                else:
                    images[key] = Member(member.name, member.offset_data, member.size, None)
    except (OSError, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataError(
            f"{file} cannot be read as a tar file: {reason or error}.",
            "Give complete tar files that are not compressed.",
        ) from None
    return [member._replace(label=labels.get(key)) for key, member in images.items()]


def class_number(content: IO[bytes] | None, file: Path, name: str) -> str:
    """Returns the class number that a member holds. Raises DataError if it holds none."""
    text = content.read(64) if content else b""
    if not re.fullmatch(rb"\s*\d+\s*", text):
        raise DataError(f"{file}: {name} holds no class number.", "Write one as text: 7")
    return str(int(text))


def is_shards(data: str) -> bool:
    """Returns whether `data` names tar files."""
    return data.endswith(TAR)


def shards_named(data: str) -> list[Path]:
    """Returns the tar files that a name such as a/{000..010}.tar stands for.

    Raises DataError if it names none, or one that does not exist.
    """
    files = [Path(name).expanduser() for name in numbered(data)]
    if not files:
        raise DataError(f"{data} names no file.", remedy="tar_files")
    for file in files:
        if not file.is_file():
            raise DataError(f"there is no tar file {file}.", remedy="tar_files")
    return files


def numbered(name: str) -> Iterator[str]:
    """Yields the names that {000..010} stands for, as in a shell."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        yield name
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        text = str(number).zfill(len(first) if first.startswith("0") else 0)
        yield from numbered(name[: found.start()] + text + name[found.end() :])
