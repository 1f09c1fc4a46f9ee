"""The interface of a task: the loss, the metrics and the images of a kind of model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.data.split import Split
from scala_cli.models.vit import Spec
from scala_cli.settings import MethodSettings, Settings
from scala_cli.watch import QUIET, Watcher
from scala_cli.world import ALONE, World


class Meter(Protocol):
    """Accumulates the metrics of one point."""

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Adds a batch: the model's outputs, and the targets: labels, or another model's outputs."""

    def result(self, world: World) -> dict[str, Any]:
        """Returns the task's columns over the images of all processes, and their number, "images"."""
        ...


class Task(Protocol):
    """One kind of work that a model does."""

    @property
    def rate(self) -> float:
        """The peak learning rate unless settings give one."""
        ...

    @property
    def opt(self) -> str:
        """The optimizer, by timm's name, unless settings give one."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether the targets are the classes of the images; if not, they are another model's outputs."""
        ...

    @property
    def every_token(self) -> bool:
        """Whether every token after the last block is read, not only what the model pools."""
        ...

    @property
    def digits(self) -> int:
        """The decimals of the metrics that are printed."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """Each metric's name in rows and JSON with its title; points are compared by the first."""
        ...

    @property
    def hub(self) -> Mapping[str, str]:
        """The model card's names of the task ("task_type") and of the first metric ("metric_type")."""
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
            names: a model's class names. If the data has the same ones, it is numbered in their order.

        Raises DataError, also if the processes see different images or classes.
        """
        ...

    def judged(self, spec: Spec, data: str, data_dir: str | None) -> Split:
        """The images on which a trained model is judged. Raises DataError, also where they do not fit it."""
        ...

    def forward(self, vit: VisionTransformer, images: Tensor) -> Tensor:
        """Returns what a model of timm makes of images (B, C, H, W), as this task wants it."""
        ...

    def read(self, vit: VisionTransformer, tokens: Tensor, shares: Sequence[Tensor] = ()) -> Tensor:
        """Returns the same from the tokens (B, N, C) after the last block and the norm that follows it.

        Args:
            shares: how tokens were slimmed, as `models.tokens.slimming` finds.
        """
        ...

    def statistics(self, outputs: Iterable[Tensor], settings: MethodSettings) -> dict[str, Tensor]:
        """Returns what `standardised` needs to know of the teacher's outputs; measured once, then kept."""
        ...

    def standardised(self, output: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Returns an output, the student's or the teacher's, in the units in which the loss compares them."""
        ...

    def loss(
        self,
        output: Tensor,
        targets: Tensor | None,
        lesson: Tensor | None,
        settings: MethodSettings,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss against the targets and against a teacher's output; None leaves either out.

        Args:
            hidden: (B, patches) which patches the output was computed without, as `masks` asked for; their
                loss is returned.
        """
        ...

    def masks(self, settings: MethodSettings) -> bool:
        """Whether every point is to learn from images with hidden patches as well, in a second pass."""
        ...

    def meter(self) -> Meter:
        """Returns a new meter."""
        ...

    def score(self, row: Mapping[str, Any]) -> float:
        """Returns the score of a row of metrics.jsonl; the best epoch has the highest."""
        ...


def main_column(task: Task) -> str:
    """The metric by which points are compared."""
    return next(iter(task.columns))
