"""What a user can mend. Anything else that escapes a command is our bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class ScalaError(Exception):
    """A mistake or a circumstance that the user can mend: one line of what, one of what to do.

    Args:
        message: what is wrong, naming the file, option or value.
        hint: the remedy, where possible the command to run next.
    """

    resumable = False
    """Whether a training run can go on once this is mended."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class PointError(ScalaError):
    """A width that cannot be cut from this model, or that was never trained."""


class CheckpointError(ScalaError):
    """A checkpoint, weight file or architecture that cannot be read or does not fit."""


class DataError(ScalaError):
    """A data set that is missing, malformed or does not fit the model."""


class TrainingError(ScalaError):
    """A training run that cannot go on."""


class LostProcess(TrainingError):
    """Another process of the same run has ended."""


@contextmanager
def naming_failure(what: str, hint: str, kind: type[ScalaError] = ScalaError) -> Iterator[None]:
    """Turns errors of any kind, as compilers, exporters, runtimes and timm raise, into one of ours."""
    try:
        yield
    except (OSError, MemoryError, ScalaError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise kind(f"{what}: {type(error).__name__}: {said[:160]}", hint) from error
