"""Errors that a user can fix. Anything else that escapes a command is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class ScalaError(Exception):
    """An error that the user can fix: one line says what is wrong, one what to do.

    Callers from Python see the message and the hint. The command line adds the text of the remedy from
    `cli/remedies.py`: what to type next.

    Args:
        message: what is wrong, naming the file or value.
        hint: what to do. It names no option or command (except pip's), since Python callers have neither.
        remedy: the name of a text in `cli.remedies.REMEDIES`.
        facts: the values that this text needs, by name.
    """

    resumable = False
    """Whether a training run can be resumed once this is fixed."""

    def __init__(self, message: str, hint: str = "", *, remedy: str = "", **facts: object) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.remedy, self.facts = remedy, facts


class PointError(ScalaError):
    """A width that cannot be cut from this model, or that was never trained."""


class CheckpointError(ScalaError):
    """A checkpoint, weight file or architecture that cannot be read or does not fit."""


class DataError(ScalaError):
    """A data set that is missing, malformed or does not fit the model."""


class TrainingError(ScalaError):
    """A training run that cannot continue."""


class LostProcess(TrainingError):
    """Another process of the same run has ended."""


@contextmanager
def naming_failure(
    what: str, hint: str = "", kind: type[ScalaError] = ScalaError, *, remedy: str = "", **facts: object
) -> Iterator[None]:
    """Turns any error of a compiler, exporter, runtime or of timm into a ScalaError.

    `hint`, `remedy` and `facts` are those of a `ScalaError`.
    """
    try:
        yield
    except (OSError, MemoryError, ScalaError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise kind(f"{what}: {type(error).__name__}: {said[:160]}", hint, remedy=remedy, **facts) from error
