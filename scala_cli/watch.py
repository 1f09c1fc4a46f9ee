"""How long work tells what it is doing, without knowing who looks."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def is_first() -> bool:
    """Whether this is the one of torchrun's processes that tells what is going on, and writes it."""
    return os.environ.get("RANK", "0") == "0"


class Stopped(KeyboardInterrupt):
    """Work was asked to stop, and does so between two steps. Its one argument is the signal that asked."""


class Watcher:
    """Told of progress; this one keeps quiet."""

    def note(self, text: str) -> None:
        """Something the user should know, once."""

    def phase(self, name: str, total: int, unit: str = "images") -> None:
        """Work of so many units begins."""

    def step(self, count: int, losses: Mapping[str, float] | None = None) -> None:
        """So many units more are done; in training with the loss of every pass, by its name.

        Within `between_steps` it may raise Stopped.
        """

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within, who asks to stop is heard at the next step, when there is something whole to save."""
        yield

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is trained, evaluated and saved; the row is as in metrics.jsonl."""


QUIET = Watcher()
