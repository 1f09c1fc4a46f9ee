"""Worker processes that read images: the signals they obey, and the error if one fails."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from threading import Thread

from scala_cli.errors import DataError

STOPPING = {signal.SIGINT, signal.SIGTERM}
NO_ROOM = re.compile(r"(shared memory object|shared memory\(shm\)|file </torch_|signal: Bus error).*")
"""Matches torch's messages if the shared memory for batches is full or unavailable."""


def ignore_stop_signals(_: int) -> None:
    """Blocks a terminal's Ctrl-C and a scheduler's SIGTERM, which also reach the workers.

    Workers run until training has saved and stops them, or until their parent ends. They still obey SIGTERM
    from the parent: Python sends it to remaining children when it exits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=obey_the_parent, daemon=True).start()
    else:  # macOS: torch's handler obeys the parent, but any process's SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def obey_the_parent() -> None:
    """Ends this process on SIGTERM from its parent only."""
    parent = parent_process()  # not always the process that forked this one
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Blocks stop signals in processes started meanwhile, before `ignore_stop_signals` runs in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def naming_a_dead_reader() -> Iterator[None]:
    """Turns torch's errors for a failed worker into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if no_room := NO_ROOM.search(str(error)):
            reason = re.search(r": ([A-Z][a-z ]+) \(\d+\)", no_room.group())
            raise DataError(
                "the processes that read images cannot pass them on: too little shared memory (/dev/shm"
                + (f": {reason[1].lower()})." if reason else ")."),
                remedy="shared_memory",
            ) from None
        if not re.search(r"(DataLoader worker|Pin memory).*(is killed|exited unexpectedly)", str(error)):
            raise
        raise DataError(
            "a process that reads images was killed; there may be too little memory.", remedy="fewer_workers"
        ) from None
