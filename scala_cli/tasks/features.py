"""The features task: slices of a backbone without a classifier keep its features; needs no labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.data.samples import Unlabelled
from scala_cli.data.split import Split, hold_out, open_images, open_validation_images
from scala_cli.errors import DataError, TrainingError
from scala_cli.models.tokens import Reduced, answer_and_patches, read_every
from scala_cli.models.vit import Spec
from scala_cli.settings import MethodSettings, Settings
from scala_cli.tasks.likeness import Likeness
from scala_cli.tasks.losses import mean_square
from scala_cli.tasks.regrid import on_the_grid_of
from scala_cli.tasks.standard import in_units, spreads
from scala_cli.watch import QUIET, Watcher

SHARE, MOST = 0.1, 1000
"""Default share of the images held out for validation, and their largest number."""


class Features:
    """Learns a frozen model's features; points are compared by R² with them."""

    labelled, every_token, digits = False, True, 4
    columns: Mapping[str, str] = {
        "r2": "R² of patches",
        "cosine": "cosine of patches",
        "class_r2": "R² of the class token",
        "class_cosine": "cosine of the class token",
    }
    hub: Mapping[str, str] = {"task_type": "image-feature-extraction", "metric_type": "r_squared"}

    def open(
        self,
        settings: Settings,
        names: Sequence[str] | None = None,
        watch: Watcher = QUIET,
    ) -> tuple[Split, Split]:
        """Returns the training and the validation images, from any folder of images; labels are not used.

        Without a validation part, or with `settings.run.holdout`, some images are held out for validation.

        Args:
            names: not used.

        Raises DataError for too few images.
        """
        data, place, share = settings.data, settings.read.data_dir, settings.run.holdout
        training = without_labels(open_images(data, place))
        validation = None if share else open_validation_images(data, place)
        if validation is None:
            if len(training) < 2:
                raise DataError(
                    f"{data} holds one image only, {training.samples.name(0)}.",
                    "Give two or more: some to train on and some to judge on.",
                )
            share = share or max(min(SHARE, MOST / len(training)), 1 / len(training))
            notes = training.notes
            training, validation = hold_out(training, share)
            told = (
                f"{len(validation)} of the {len(training) + len(validation)} images validate, the rest train."
            )
            training = replace(training, notes=(*notes, told))
        training.tell(watch)
        validation = Split(Unlabelled(validation.samples), (), validation.notes)
        validation.tell(watch)
        return training, validation

    def judged(self, spec: Spec, data: str, data_dir: str | None) -> Split:
        """Returns the validation images, or all images without a validation part. Raises DataError."""
        found = open_validation_images(data, data_dir)
        if found is not None:
            return without_labels(found)
        every = without_labels(open_images(data, data_dir))
        told = f"{data} has no validation part, so all of its images are used for evaluation."
        return replace(every, notes=(*every.notes, told))

    def forward(self, vit: VisionTransformer, images: Tensor) -> Tensor:
        """Returns (B, 1 + patches, C): the model's own output, then its patch tokens through the head."""
        return answer_and_patches(vit, images)

    def read(self, vit: VisionTransformer, tokens: Tensor, reduced: Sequence[Reduced] = ()) -> Tensor:
        """Returns the same as `forward`, from the tokens after the last norm."""
        return read_every(vit, tokens, reduced)

    def statistics(self, outputs: Iterable[Tensor], settings: MethodSettings) -> dict[str, Tensor]:
        """Returns the units in which features are compared: {"answer", "patches"}, from `Spread.unit`.

        Raises DataError if all images have the same features.
        """
        units = {}
        for name, spread in zip(("answer", "patches"), spreads(outputs), strict=True):
            unit = spread.unit(settings.whiten)
            if unit is None:
                raise DataError(
                    "the images are all the same to the model: there is nothing to learn from them.",
                    "Give images that differ.",
                )
            units[name] = unit
        return units

    def standardised(self, output: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Returns features (B, 1 + patches, C) in the measured units; unchanged without `statistics`."""
        if not statistics:
            return output
        answer, patches = in_units(output[:, :1], statistics["answer"]), statistics["patches"]
        return torch.cat([answer, in_units(output[:, 1:], patches)], 1)

    def loss(
        self,
        output: Tensor,
        targets: Tensor | None,
        lesson: Tensor | None,
        settings: MethodSettings,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the weighted sum of the mean squared errors of class token and patch tokens.

        With `hidden`, only the weighted error of the hidden patches, which the teacher saw. These are the
        three terms of Proteus (ICLR 2025). If the student saw a smaller image, the teacher's patches are
        resampled to the student's grid.

        Args:
            output, lesson: (B, 1 + patches, C) of the student and the teacher, in the same units.
            targets: not used.
            hidden: (B, patches) which patches were hidden from the student.

        Raises TrainingError without a teacher.
        """
        if lesson is None:
            raise TrainingError(
                "features are learnt from a teacher, and there is none.",
                remedy="leave_out",
                setting="teacher",
            )
        lesson = on_the_grid_of(lesson, output)
        patches = mean_square(output[:, 1:], lesson[:, 1:], hidden)
        if hidden is not None:
            return settings.mask_patches * patches
        answer = mean_square(output[:, 0], lesson[:, 0])
        return settings.class_token * answer + settings.patch_tokens * patches

    def masks(self, settings: MethodSettings) -> bool:
        return settings.mask_patches > 0

    def meter(self) -> Likeness:
        return Likeness()

    def score(self, row: Mapping[str, Any]) -> float:
        """Returns the mean R² of the patches over the points."""
        return fmean(point["r2"] for point in row["points"])


def without_labels(split: Split) -> Split:
    """Returns the images without their labels, with a note if there are any."""
    named = split.classes or holds_classes(split.samples)
    notes = (*split.notes, "labels are not used: features need none.") if named else split.notes
    return Split(Unlabelled(split.samples), (), notes)


def holds_classes(samples: object) -> bool:
    """Returns whether images seem sorted by class: all in several folders with the same parent."""
    folders = getattr(samples, "directories", ())
    return len(folders) > 1 and len({Path(folder).parent for folder in folders}) == 1
