"""The interface of a task: its loss, metrics and images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.data.split import Split
from scala_cli.models.tokens import Reduced
from scala_cli.models.vit import Spec
from scala_cli.settings import MethodSettings, Settings
from scala_cli.watch import QUIET, Watcher
from scala_cli.world import World


class Meter(Protocol):
    """Accumulates the metrics of one point."""

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Adds a batch of outputs and their targets: labels, or another model's outputs."""

    def result(self, world: World) -> dict[str, Any]:
        """Returns the task's metrics over the images of all processes, and "images", their number."""
        ...


class Task(Protocol):
    """What a model is for."""

    @property
    def labelled(self) -> bool:
        """Whether the targets are class labels; if not, they are another model's outputs."""
        ...

    @property
    def every_token(self) -> bool:
        """Whether every token after the last block is used, not only the pooled one."""
        ...

    @property
    def digits(self) -> int:
        """Number of decimals shown of a metric."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """The name of each metric in rows and JSON -> its title; points are compared by the first."""
        ...

    @property
    def hub(self) -> Mapping[str, str]:
        """The task ("task_type") and the first metric ("metric_type") as named in model cards."""
        ...

    def open(
        self,
        settings: Settings,
        names: Sequence[str] | None = None,
        watch: Watcher = QUIET,
    ) -> tuple[Split, Split]:
        """Returns the training and the validation images.

        Args:
            names: a model's class names. If the data has the same ones, they are numbered in this order.

        Raises DataError.
        """
        ...

    def judged(self, spec: Spec, data: str, data_dir: str | None) -> Split:
        """Returns the images to evaluate a model on. Raises DataError, also if they do not fit the model."""
        ...

    def forward(self, vit: VisionTransformer, images: Tensor) -> Tensor:
        """Returns a timm model's output for images (B, C, H, W), in the form that this task needs."""
        ...

    def read(self, vit: VisionTransformer, tokens: Tensor, reduced: Sequence[Reduced] = ()) -> Tensor:
        """Returns the same as `forward`, from the tokens (B, N, C) after the last block and its norm.

        Args:
            reduced: how tokens were reduced, from `models.tokens.reductions`.
        """
        ...

    def statistics(self, outputs: Iterable[Tensor], settings: MethodSettings) -> dict[str, Tensor]:
        """Returns statistics of the teacher's outputs for `standardised`; computed once and saved."""
        ...

    def standardised(self, output: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Returns an output of the student or the teacher in the units in which the loss compares them."""
        ...

    def loss(
        self,
        output: Tensor,
        targets: Tensor | None,
        lesson: Tensor | None,
        settings: MethodSettings,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss against the targets and a teacher's output; either may be None.

        Args:
            lesson: the teacher's output.
            hidden: (B, patches) which patches were hidden from the student, if `masks`; then only their loss
                is returned.
        """
        ...

    def masks(self, settings: MethodSettings) -> bool:
        """Whether every point also learns from images with hidden patches, in a second pass."""
        ...

    def meter(self) -> Meter:
        """Returns a new meter."""
        ...

    def score(self, row: Mapping[str, Any]) -> float:
        """Returns the score of a row of metrics.jsonl; the best epoch has the highest."""
        ...


def main_column(task: Task) -> str:
    """Returns the metric by which points are compared."""
    return next(iter(task.columns))
