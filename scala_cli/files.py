"""Atomic writes that replace only files this package writes."""

import errno
import os
import re
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from scala_cli.errors import ScalaError
from scala_cli.lock import LOCK
from scala_cli.swap import LONGEST, remove, restore, swap, target_of, temporary

DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT),
}
"""Error numbers of a disk that is full or gone."""


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a fresh directory, which replaces `target` once the block ends without an error.

    Its files are flushed to disk first. Readers always find a whole directory, the old or the new one.
    An error in the block leaves no trace.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    restore(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    with fresh_directory(target) as fresh:
        with naming_a_full_disk(target):
            yield fresh
        settle(fresh)
        if os.path.lexists(target):
            swap(fresh, target)
        else:
            fresh.rename(target)
        flush(target.parent)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields an empty file, which replaces `target` once the block ends without an error."""
    fresh = temporary(target)
    fresh.touch(exist_ok=False)
    try:
        with naming_a_full_disk(target):
            yield fresh
        flush(fresh)
        fresh.replace(target)
        flush(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def whole_files(target: Path, force: bool) -> Iterator[Path]:
    """Yields a fresh directory for `target` and the files beside it; all are moved into place at the end.

    Raises ScalaError if one of them would replace a directory, or a file without `force`.
    """
    with fresh_directory(target) as fresh:
        with naming_a_full_disk(target):
            yield fresh
        settle(fresh)
        files = sorted(fresh.iterdir(), key=lambda file: file.name == target.name)  # the target comes last
        for file in files:
            refuse_existing(target.parent / file.name, force)
        for file in files:
            file.replace(target.parent / file.name)
        flush(target.parent)


@contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target`; at the end removes whatever then has its name."""
    fresh = temporary(target)
    fresh.mkdir()
    try:
        yield fresh
    finally:
        with suppress(OSError):
            remove(fresh)


@contextmanager
def new_directory(wanted: Path) -> Iterator[Path]:
    """Yields a new directory: `wanted`, or wanted-2, wanted-3, ... if that name is taken.

    Removes it, and a parent made for it, if it is empty at the end.
    """
    made = [] if wanted.parent.is_dir() else [wanted.parent]
    number, path = 1, wanted
    while True:
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
    try:
        yield path
    finally:
        with suppress(OSError):
            for empty in (path, *made):
                empty.rmdir()


def settle(directory: Path) -> None:
    """Flushes the contents of a new directory and gives them the modes that the user's umask allows.

    Libraries choose other modes: safetensors makes files that only the owner can read.
    """
    mode = stat.S_IMODE(directory.stat().st_mode)
    for place, folders, files in os.walk(directory, topdown=False):
        for name in folders:
            Path(place, name).chmod(mode)
        for name in files:
            Path(place, name).chmod(mode & 0o666)
            flush(Path(place, name))
        flush(Path(place))


@contextmanager
def naming_a_full_disk(target: Path) -> Iterator[None]:
    """Turns the errors that safetensors, torch and exporters raise for a full disk back into OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        told = re.search(r"os error (\d+)", str(error))  # safetensors
        number = int(told[1]) if told else error.errno if isinstance(error, OSError) else disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(target)) from None


def disk_error(error: BaseException | None) -> int | None:
    """Returns the number of the disk error that caused an error of torch or an exporter, if one did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return error.errno
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def flush(path: Path) -> None:
    """Flushes a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_unwritable(file: Path) -> None:
    """Raises ScalaError, or OSError, unless a file can be written there."""
    if file.is_dir():
        raise ScalaError(f"{file} is a directory.", "Name a file.")
    if not file.parent.is_dir():
        raise ScalaError(f"there is no directory {file.parent}.", "Create it, or name another place.")
    refuse_long(file)
    refuse_forbidden(file.parent)


def refuse_existing(file: Path, force: bool) -> None:
    """Raises ScalaError if the file is a directory, or if it exists and `force` is not set."""
    if file.is_dir():
        raise ScalaError(f"{file} is a directory.", remedy="other_file")
    if os.path.lexists(file) and not force:
        raise ScalaError(f"{file} exists.", remedy="other_file_or_force")


def refuse_occupied(
    target: Path, force: bool, ours: Set[str], source: Path | None = None, in_place: bool = False
) -> None:
    """Raises ScalaError, or OSError, unless `target` is a directory that a command may write.

    With `force` a directory may be replaced if it holds only `ours`, but never one that is, or contains, the
    `source` that the command reads.

    Args:
        ours: the files that the command itself writes, as paths in `target`: "last/config.json".
        in_place: whether files are written into the directory, not into a new one that replaces it.
    """
    restore(target)
    if not in_place:
        refuse_fixed(target)
    if source is not None and target.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ScalaError(f"{target} holds what is read; it is not replaced.", remedy="other_directory")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ScalaError(f"{target} is not a directory.", remedy="other_directory")
    refuse_long(target)
    refuse_forbidden(target if in_place else target.parent)
    held = [*walk(target, ours)] if target.exists() else []
    names = {path.relative_to(target).parts[0] for path, _ in held} - {LOCK}
    if not force and not all(map(target_of, names)):  # leftovers of a killed process do not count
        raise ScalaError(f"{target} is not empty.", remedy="other_directory_or_force")
    strange = next((path.relative_to(target) for path, is_ours in held if not is_ours), None)
    if strange is not None:
        raise ScalaError(
            f"{target} holds files that are not ours ({strange}); it is not replaced.",
            remedy="other_directory",
        )


def refuse_fixed(directory: Path) -> None:
    """Raises ScalaError if the directory cannot be replaced by another."""
    place = directory.resolve()
    if Path.cwd().is_relative_to(place):
        why = "is the working directory, or holds it"
    elif directory.name in ("", ".."):
        why = "has no name of its own"
    elif os.path.ismount(place):
        why = "is a mount point"
    else:
        return
    raise ScalaError(f"{directory} {why}; it is not replaced.", remedy="directory_within")


def refuse_long(path: Path) -> None:
    """Raises ScalaError if the name is too long to make a temporary one from it."""
    length = len(os.fsencode(path.name))
    if length > LONGEST:
        raise ScalaError(
            f"the name {path.name[:20]}... has {length} bytes, more than {LONGEST}.", "Choose a shorter one."
        )


def refuse_forbidden(directory: Path) -> None:
    """Raises OSError if this user may not write to the directory or create it."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def walk(directory: Path, ours: Set[str]) -> Iterator[tuple[Path, bool]]:
    """Yields every file and every unknown directory, each with whether it is one of `ours`.

    A link in place of one of our directories counts as ours and is not followed. Temporary files of a killed
    process count as ours too.
    """
    for path in sorted(directory.iterdir()):
        name = target_of(path.name) or path.name
        below = {file.removeprefix(f"{name}/") for file in ours if file.startswith(f"{name}/")}
        if name != path.name or path.is_symlink():
            yield path, name in ours or bool(below)
        elif path.is_dir() and below:
            yield from walk(path, below)
        else:
            yield path, name in ours and not path.is_dir()


def clear(directory: Path, ours: Set[str]) -> None:
    """Removes `ours` from a directory, then its empty subdirectories; nothing else."""
    for path, is_ours in [*walk(directory, ours)]:
        if is_ours:
            remove(path)
    folders = {parent for file in ours for parent in Path(file).parents if parent != Path()}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):
            (directory / folder).rmdir()
