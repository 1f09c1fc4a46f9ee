"""Ctrl-C and SIGTERM."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

AT_ONCE = 2.0
"""Seconds in which torchrun passes on to its processes what a terminal has sent to all of them itself."""


class Stop:
    """Hears SIGINT and SIGTERM: at once, or where work would rather finish its step, at the second.

    One more, while the process is ending, leaves it where it stands, temporary files and all.

    Args:
        note: told once that the first was heard.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.waits = False
        self.asked: int | None = None
        self.moment = -AT_ONCE
        self.ending = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if "TORCHELASTIC_RUN_ID" in os.environ and now - self.moment < AT_ONCE:
            return
        self.moment = now
        if self.ending:
            try:
                Console(stderr=True).show_cursor()  # a bar hides it
            finally:  # also where it was writing there when the signal came
                os._exit(128 + number)
        if not self.waits or self.asked is not None:
            self.ending = True
            raise KeyboardInterrupt(number)
        self.asked = number
        self.note("stopping after this step, once its state is saved; again to stop at once.")

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within, both signals are heard here."""
        before = {number: signal.signal(number, self.hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
