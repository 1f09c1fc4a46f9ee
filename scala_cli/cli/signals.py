"""Handles Ctrl-C and SIGTERM."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

AT_ONCE = 2.0
"""Seconds within which torchrun forwards a signal that the terminal has already sent to all processes."""
STDERR = 2
NOTE = b"stopping after this step, once its state is saved; again to stop at once.\n"
FROM_LINE_START, SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25h"
"""Control sequences for a terminal: a progress bar leaves its line unfinished and hides the cursor."""


class Stop:
    """Handles SIGINT and SIGTERM: the first stops at once, or after the current step while `waits` is set.

    In the latter case a second one stops at once. A further one, while the process is ending, ends it
    without removing temporary files.

    Args:
        tells: whether to print a note at the first signal.
    """

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self.waits = False
        self.asked: int | None = None
        self.moment = -AT_ONCE
        self.ending = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. Takes no lock and uses no stream: the interrupted code may hold either."""
        now = time.monotonic()
        if "TORCHELASTIC_RUN_ID" in os.environ and now - self.moment < AT_ONCE:
            return
        self.moment = now
        if self.ending:
            try:
                write(SHOW_CURSOR, b"")
            finally:  # even if one more signal interrupts the write
                os._exit(128 + number)
        if not self.waits or self.asked is not None:
            self.ending = True
            raise KeyboardInterrupt(number)
        self.asked = number
        if self.tells:
            write(FROM_LINE_START, NOTE)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handles both signals while active."""
        before = {number: signal.signal(number, self.hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def write(control: bytes, text: bytes) -> None:
    """Writes to stderr at once, the control sequence to a terminal only."""
    with suppress(OSError):
        os.write(STDERR, control + text if os.isatty(STDERR) else text)
