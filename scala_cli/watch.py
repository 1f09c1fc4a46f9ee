"""The interface through which long work reports progress."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def is_first() -> bool:
    """Whether this process is rank 0, the one that prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


class Stopped(KeyboardInterrupt):
    """Raised between two steps after Ctrl-C or SIGTERM. Its one argument is the signal's number."""


class Watcher:
    """Receives progress. This base class ignores it."""

    def note(self, text: str) -> None:
        """Reports something the user should know, once."""

    def phase(self, name: str, total: int, unit: str = "images", done: int = 0) -> None:
        """Starts a phase of `total` units of work, of which `done` are finished already."""

    def step(self, count: int, losses: Mapping[str, float] | None = None) -> None:
        """Adds `count` finished units; in training also the loss of every pass, by name.

        Inside `between_steps` it may raise Stopped.
        """

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """While active, Ctrl-C and SIGTERM take effect after the current step, once it can be saved."""
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While active, the teacher of a run is trained, not yet the run itself."""
        yield

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Reports that an epoch is trained, evaluated and saved; the row is that of metrics.jsonl."""


QUIET = Watcher()
