"""Temporary names, and the swap of one directory for another.

If the system can swap two directories in one step, a name in use never goes missing. If it cannot, a process
killed in between leaves the former directory where `restore` finds it.
"""

import ctypes
import os
import re
import shutil
import sys
from pathlib import Path

FRESH, FORMER = ".new", ".former"
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}(\.new|\.former)", re.DOTALL)
LONGEST = 200
"""Longest name, in bytes, that leaves room for a temporary one; file systems allow 255."""
EXCHANGE = 2
"""RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS."""
WORKING_DIRECTORY = -100
"""Linux's AT_FDCWD: paths are relative to it."""


def temporary(target: Path) -> Path:
    """Returns an unguessable name beside `target` for the file or directory that will replace it."""
    return target.with_name(f".{target.name}.{os.urandom(8).hex()}{FRESH}")


def target_of(name: str) -> str | None:
    """Returns the name that a temporary name was made for, None for any other name."""
    match = TEMPORARY.fullmatch(name)
    return match[1] if match else None


def swap(fresh: Path, target: Path) -> None:
    """Gives each of two paths the other's name: in one step if the system can, else in three."""
    if exchanged(fresh, target):
        return
    former = fresh.with_suffix(FORMER)
    try:
        target.rename(former)
        fresh.rename(target)
    finally:
        if os.path.lexists(former):
            former.rename(fresh if os.path.lexists(target) else target)


def exchanged(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step; returns whether the system could."""
    libc = ctypes.CDLL(None)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return libc.renamex_np(*paths, EXCHANGE) == 0
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(WORKING_DIRECTORY, paths[0], WORKING_DIRECTORY, paths[1], EXCHANGE) == 0


def restore(target: Path) -> None:
    """Restores the former version if a process was killed before the new one replaced it."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    formers = [
        path
        for path in target.parent.iterdir()
        if path.suffix == FORMER and target_of(path.name) == target.name
    ]
    if formers:
        max(formers, key=lambda path: path.lstat().st_mtime).rename(target)


def remove(path: Path) -> None:
    """Removes a file, a directory and its contents, or a link, but never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
