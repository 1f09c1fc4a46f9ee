"""The classification task: one class for every image."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from timm.models import VisionTransformer
from timm.utils import AverageMeter, accuracy
from torch import Tensor

from scala_cli.data.classes import class_misfit
from scala_cli.data.split import Split, hold_out, open_split
from scala_cli.errors import DataError
from scala_cli.models.tokens import Reduced
from scala_cli.models.vit import Spec
from scala_cli.settings import MethodSettings, Settings
from scala_cli.tasks.losses import cross_entropy, distillation
from scala_cli.watch import QUIET, Watcher
from scala_cli.world import World


class Accuracy:
    """Top-1 and top-5 accuracy in percent; with fewer than five classes top-5 is 100."""

    def __init__(self) -> None:
        self.meters = {"top1": AverageMeter(), "top5": AverageMeter()}

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Adds (B, classes) logits and (B,) class numbers."""
        shares = accuracy(output.float(), targets, topk=(1, 5))
        for meter, share in zip(self.meters.values(), shares, strict=True):
            meter.update(share.item(), len(targets))

    def result(self, world: World) -> dict[str, Any]:
        """Returns {"top1", "top5", "images"}."""
        values, count = {}, 0.0
        for name, meter in self.meters.items():
            total, count = world.total(meter.sum, meter.count)
            values[name] = round(total / max(count, 1), 4)
        return {**values, "images": int(count)}


class Classification:
    """Learns from labels and a teacher's predictions; points are compared by top-1."""

    labelled, every_token, digits = True, False, 2
    columns: Mapping[str, str] = {"top1": "top-1, %", "top5": "top-5, %"}
    hub: Mapping[str, str] = {"task_type": "image-classification", "metric_type": "accuracy"}

    def open(
        self,
        settings: Settings,
        names: Sequence[str] | None = None,
        watch: Watcher = QUIET,
    ) -> tuple[Split, Split]:
        """Returns the training and the validation images.

        With `settings.run.holdout` the validation images are held out of the training images.

        Args:
            names: a model's class names. If the data has the same ones, they are numbered in this order.

        Raises DataError for a single class.
        """
        data, place = settings.data, settings.read.data_dir
        training = open_split(data, True, place)
        if len(training.classes) < 2:
            raise DataError(
                f"{data} holds one class only, {training.classes[0]!r}.", "Give images of two or more."
            )
        training = training.numbered_as(names)
        if settings.run.holdout:
            training, validation = hold_out(training, settings.run.holdout)
        else:
            validation = open_split(data, False, place, training.classes).numbered_as(training.classes)
        training.tell(watch)
        validation.tell(watch)
        return training, validation

    def judged(self, spec: Spec, data: str, data_dir: str | None) -> Split:
        """Returns the validation images, their classes numbered as in the model's head.

        Raises DataError, also if the classes of data and model differ.
        """
        split = open_split(data, False, data_dir).numbered_as(spec.label_names)
        misfit = class_misfit(split.classes, spec.num_classes, spec.label_names)
        if misfit:
            raise DataError(f"{misfit}.", remedy="same_classes", data=data)
        return split

    def forward(self, vit: VisionTransformer, images: Tensor) -> Tensor:
        """Returns (B, classes) logits."""
        return vit(images)

    def read(self, vit: VisionTransformer, tokens: Tensor, reduced: Sequence[Reduced] = ()) -> Tensor:
        """Returns the logits from the tokens after the last norm."""
        return vit.forward_head(tokens)

    def statistics(self, outputs: Iterable[Tensor], settings: MethodSettings) -> dict[str, Tensor]:
        """Returns {}: logits are compared unscaled."""
        return {}

    def standardised(self, output: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits unchanged."""
        return output

    def loss(
        self,
        output: Tensor,
        targets: Tensor | None,
        lesson: Tensor | None,
        settings: MethodSettings,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the cross-entropy with the labels plus the divergence from the teacher (Scala, eq. 4).

        Args:
            output, lesson: (B, classes) logits of the student and the teacher.
            targets: (B,) class numbers or (B, classes) probabilities.
            hidden: not used.
        """
        loss = output.new_zeros(())
        if targets is not None:
            loss = loss + cross_entropy(output, targets, settings.smoothing)
        if lesson is not None:
            loss = loss + distillation(output, lesson)
        return loss

    def masks(self, settings: MethodSettings) -> bool:
        """Returns False: patches are hidden only to learn features."""
        return False

    def meter(self) -> Accuracy:
        return Accuracy()

    def score(self, row: Mapping[str, Any]) -> float:
        """Returns the mean top-1 over the points."""
        return fmean(point["top1"] for point in row["points"])
