"""Metrics that compare a model's features with a reference model's, accumulated batch by batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_cli.errors import DataError
from scala_cli.slicing.ridge import in_double
from scala_cli.tasks.regrid import on_the_grid_of
from scala_cli.tasks.standard import NOTHING
from scala_cli.world import World


class Sums:
    """Sums for R² and the mean cosine of one kind of token, in float64."""

    def __init__(self) -> None:
        self.count, self.error, self.square, self.cosine = 0, 0.0, 0.0, 0.0
        self.sum: Any = 0.0

    def add(self, tokens: Tensor, wanted: Tensor) -> None:
        """Adds tokens (B, N, C) of the model and of the reference."""
        given, true = (in_double(each).flatten(0, 1) for each in (tokens, wanted))
        self.count += len(true)
        self.error += (given - true).square().sum().item()
        self.square += true.square().sum().item()
        self.cosine += F.cosine_similarity(given, true).sum().item()
        self.sum = self.sum + true.sum(0).cpu()

    def result(self, world: World) -> tuple[int, float | None, float]:
        """Returns the number of tokens of all processes, R² and the mean cosine.

        R² = 1 - (squared errors) / (squared deviations of the reference from its mean), over all channels;
        None if the reference does not vary.
        """
        mine = self.sum.tolist() if self.count else []
        lengths, read = world.total(len(mine), len(mine) > 0)
        mine = mine or [0.0] * int(lengths / max(read, 1))  # if this process could read no image
        count, error, square, cosine, *sums = world.total(
            self.count, self.error, self.square, self.cosine, *mine
        )
        spread = square - torch.tensor(sums, dtype=torch.float64).square().sum().item() / max(count, 1)
        r2 = 1 - error / spread if spread > NOTHING * square else None
        return int(count), r2, cosine / max(count, 1)


class Likeness:
    """R² and cosine of the patch tokens, and of the class token (or pooled token).

    The R² of the class token is None if the reference's is the same for all images.
    """

    def __init__(self) -> None:
        self.answer, self.patches = Sums(), Sums()

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Adds features (B, 1 + patches, C) of the model, and of the reference on any grid."""
        targets = on_the_grid_of(targets, output)
        self.answer.add(output[:, :1], targets[:, :1])
        self.patches.add(output[:, 1:], targets[:, 1:])

    def result(self, world: World) -> dict[str, Any]:
        """Returns {"r2", "cosine", "class_r2", "class_cosine", "images"}.

        Raises DataError if the reference's features are the same for all patches of all images.
        """
        _, r2, cosine = self.patches.result(world)
        images, class_r2, class_cosine = self.answer.result(world)
        if images and r2 is None:
            raise DataError(
                f"the reference gives the same features for all patches of all {images} images.",
                "Give images that differ.",
            )
        values = {"r2": r2, "cosine": cosine, "class_r2": class_r2, "class_cosine": class_cosine}
        rounded = {name: None if value is None else round(value, 6) for name, value in values.items()}
        return {**rounded, "images": images}
