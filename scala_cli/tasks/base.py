"""What a task is: what a model is for decides its loss, its metrics and its images."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from scala_cli.data.split import Split
from scala_cli.settings import MethodSettings, Settings
from scala_cli.watch import QUIET, Watcher
from scala_cli.world import ALONE, World


class Meter(Protocol):
    """Counts what one point answers."""

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Counts a batch in: what the model answers, and what it should."""

    def result(self, world: World) -> dict[str, Any]:
        """The task's columns over the images of all processes, and "images": how many these were."""
        ...


class Task(Protocol):
    """One kind of work that a model does."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Each metric's name in rows and JSON, and its title; the first is what points are compared by."""
        ...

    @property
    def hub(self) -> Mapping[str, str]:
        """What a model card calls the task ("task_type") and the first metric ("metric_type")."""
        ...

    def open(
        self,
        settings: Settings,
        names: Sequence[str] | None = None,
        watch: Watcher = QUIET,
        world: World = ALONE,
    ) -> tuple[Split, Split]:
        """The training and the validation images.

        Args:
            names: of a model's classes. Where they are the data's in another order, that order counts.

        Raises DataError, also where a process sees other images or classes than the others.
        """
        ...

    def loss(
        self, output: Tensor, targets: Tensor | None, lesson: Tensor | None, settings: MethodSettings
    ) -> Tensor:
        """How far an answer is from the targets, and from what a teacher answered; None leaves out either."""
        ...

    def meter(self) -> Meter:
        """A fresh one."""
        ...

    def score(self, row: Mapping[str, Any]) -> float:
        """What the best epoch is best at, of a row of metrics.jsonl."""
        ...


def main_column(task: Task) -> str:
    """The metric by which points are compared."""
    return next(iter(task.columns))
