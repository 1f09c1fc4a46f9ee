"""The processes that read images: which signals they obey, and the error when one fails."""

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
"""Messages of torch when the shared memory for batches is full or unavailable."""


def ignore_stop_signals(_: int) -> None:
    """Block a terminal's Ctrl-C and a scheduler's SIGTERM, which also reach the processes that read.

    They run until training has saved and stops them, and they end with their parent. They still obey SIGTERM
    from the parent: Python sends it to remaining children when it exits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=obey_the_parent, daemon=True).start()
    else:  # macOS: torch's own handler obeys the parent, but lets anybody's SIGTERM end the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def obey_the_parent() -> None:
    """End this process on SIGTERM from its parent only."""
    parent = parent_process()  # which is not always the one that forked this process
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Start processes that stop signals do not reach, even before `ignore_stop_signals` has run in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def naming_a_dead_reader() -> Iterator[None]:
    """Turn the errors that torch raises when a reading process has failed into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if no_room := NO_ROOM.search(str(error)):
            reason = re.search(r": ([A-Z][a-z ]+) \(\d+\)", no_room.group())
            raise DataError(
                "the processes that read images cannot hand them over: too little shared memory (/dev/shm"
                + (f": {reason[1].lower()})." if reason else ")."),
                remedy="shared_memory",
            ) from None
        if not re.search(r"(DataLoader worker|Pin memory).*(is killed|exited unexpectedly)", str(error)):
            raise
        raise DataError(
            "a process that reads images was killed; there may be too little memory.", remedy="fewer_workers"
        ) from None
