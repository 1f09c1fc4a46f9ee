"""How long work tells what it is doing, without knowing who looks."""

from collections.abc import Mapping
from typing import Any


class Watcher:
    """Told of progress; this one keeps quiet."""

    def note(self, text: str) -> None:
        """Something the user should know, once."""

    def phase(self, name: str, total: int, unit: str = "images") -> None:
        """Work of so many units begins."""

    def step(self, count: int, losses: Mapping[str, float] | None = None) -> None:
        """So many units more are done; in training with the loss of every pass, by its name."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is trained, evaluated and saved; the row is as in metrics.jsonl."""


QUIET = Watcher()
