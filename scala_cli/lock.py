"""Locks a run directory, so that one process at a time trains in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scala_cli.errors import TrainingError

LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory; the system releases the lock when the process ends, however it ends.

    Forked child processes do not hold the lock. A file system without locks locks nothing.
    Raises TrainingError if another process holds the lock.
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(OSError):
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise TrainingError(
                    f"another process is training {directory}.", "Wait until it ends, or stop it first."
                ) from None
        yield
    finally:
        os.close(handle)
