"""Ctrl-C and SIGTERM."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

AT_ONCE = 2.0
"""Seconds in which torchrun passes on to its processes what a terminal has sent to all of them itself."""
STDERR = 2
NOTE = b"stopping after this step, once its state is saved; again to stop at once.\n"
FROM_LINE_START, SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25h"
"""A bar leaves its line unfinished, and hides the cursor."""


class Stop:
    """Hears SIGINT and SIGTERM: at once, or where work would rather finish its step, at the second.

    One more, while the process is ending, leaves it where it stands, temporary files and all.

    Args:
        tells: whether the user is told that the first was heard.
    """

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self.waits = False
        self.asked: int | None = None
        self.moment = -AT_ONCE
        self.ending = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Takes no lock and writes to no stream: the code that a signal interrupts may hold either."""
        now = time.monotonic()
        if "TORCHELASTIC_RUN_ID" in os.environ and now - self.moment < AT_ONCE:
            return
        self.moment = now
        if self.ending:
            try:
                write(SHOW_CURSOR, b"")
            finally:  # also where one more signal comes here
                os._exit(128 + number)
        if not self.waits or self.asked is not None:
            self.ending = True
            raise KeyboardInterrupt(number)
        self.asked = number
        if self.tells:
            write(FROM_LINE_START, NOTE)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, both signals are heard here."""
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
