"""Writing that either happens wholly or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from scala_cli.errors import ScalaError

DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT),
}
"""What the system says where a disk takes no more, or is not there any more."""


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A fresh directory to fill, which takes `target`'s place once the block ends without an error.

    Its files are flushed to disk before the rename; a former `target` stays whole until then. Whatever
    goes wrong inside, no trace is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with naming_a_full_disk(target):
            yield fresh
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for the owner alone
            flush(path)
        flush(fresh)
        former = fresh.with_name(f"{fresh.name}.former")
        try:
            if target.exists():
                target.rename(former)
            fresh.rename(target)
        finally:
            if former.exists() and not target.exists():
                former.rename(target)
        flush(target.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write, which takes `target`'s place once the block ends without an error."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
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
    """A fresh directory for `target` and files that go with it; all take their places at the end.

    Raises ScalaError where, without `force`, one of them would replace another file.
    """
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        fresh = Path(name)
        with naming_a_full_disk(target):
            yield fresh
        for file in fresh.iterdir():
            refuse_existing(target.parent / file.name, force)
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == target.name):  # it comes last
            flush(file)
            file.replace(target.parent / file.name)
        flush(target.parent)


@contextmanager
def naming_a_full_disk(target: Path) -> Iterator[None]:
    """Turns what safetensors, torch and exporters make of a disk's error back into the OSError it is."""
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
    """The number of what a disk says behind other errors: torch's, then perhaps an exporter's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return error.errno
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def flush(path: Path) -> None:
    """Returns once the disk holds the file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_unwritable(file: Path) -> None:
    """Raises ScalaError unless a file can lie there."""
    if file.is_dir():
        raise ScalaError(f"{file} is a directory.", "Name a file.")
    if not file.parent.is_dir():
        raise ScalaError(f"there is no directory {file.parent}.", "Make it, or name another place.")


def refuse_existing(file: Path, force: bool) -> None:
    """Raises ScalaError where, without `force`, a file would be replaced."""
    if file.exists() and not force:
        raise ScalaError(f"{file} exists.", "Choose another name with -o FILE, or replace it: --force")


def refuse_occupied(target: Path, force: bool, ours: set[str], source: Path | None = None) -> None:
    """Raises ScalaError unless `target` is free to write to.

    With `force` a directory may be replaced, but only one that holds nothing but `ours`: the names that
    the command itself writes; and never one that is, or holds, the `source` that the command reads.
    """
    if source is not None and target.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ScalaError(f"{target} holds what is read; it is not replaced.", "Choose another one: -o DIR")
    if Path.cwd().is_relative_to(target.resolve()):
        raise ScalaError(f"{target} is, or holds, the directory you are in.", "Choose another one: -o DIR")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ScalaError(f"{target} is not a directory.", "Choose another one: -o DIR")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    held -= {name for name in held if any(name.startswith(f".{own}.") for own in ours)}  # of a killed run
    if held and not force:
        raise ScalaError(f"{target} is not empty.", "Choose another one with -o DIR, or replace it: --force")
    if held - ours:
        raise ScalaError(
            f"{target} holds files that are not ours ({sorted(held - ours)[0]}); it is not replaced.",
            "Choose another one: -o DIR",
        )
