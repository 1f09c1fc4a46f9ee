"""A second teacher: any timm classifier, from which a distillation head learns (DeiT, arXiv 2012.12877)."""

from typing import Any

import torch
from torch import Tensor, nn

from scala_cli.data.classes import class_misfit
from scala_cli.errors import CheckpointError, TrainingError, naming_failure
from scala_cli.models.hub import quiet_hub
from scala_cli.models.named import config_of, directory_of, own_weights, with_classes
from scala_cli.models.vit import Spec


class Expert(nn.Module):
    """A frozen classifier that takes the student's images and converts their normalisation to its own.

    Args:
        name: a timm name, or a directory in timm's format.
        spec: the student's Spec.

    Raises:
        CheckpointError: if there is no such model, or it has no weights.
        TrainingError: if its classes differ from the student's, or it cannot take the student's images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, spec: Spec) -> None:
        super().__init__()
        self.model = opened(name).eval().requires_grad_(False)
        cfg = self.model.pretrained_cfg
        names = cfg.get("label_names")
        count = int(self.model.num_classes)
        known = spec.label_names or [str(number) for number in range(spec.num_classes)]
        comparable = names if spec.label_names else None
        if misfit := class_misfit(known, count, comparable):
            raise TrainingError(
                f"{name} cannot teach: {misfit.replace('the data', 'the student')}.",
                "Name a model that was trained on the same classes.",
            )
        if comparable and list(comparable) != list(known):
            raise TrainingError(
                f"{name} cannot teach: its classes are in another order.",
                "Name a model whose classes are in the student's order.",
            )
        given, wanted = (
            [torch.tensor(each[part])[:, None, None] for part in ("mean", "std")]
            for each in (spec.pretrained_cfg, cfg)
        )
        self.register_buffer("scale", given[1] / wanted[1])
        self.register_buffer("shift", (given[0] - wanted[0]) / wanted[1])
        with naming_failure(f"{name} does not take the student's images", kind=TrainingError):
            self(torch.zeros(1, *spec.input_size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Predicts class numbers: (B, C, H, W), normalised for the student -> (B,)."""
        return self.model(images * self.scale + self.shift).argmax(-1)

    def train(self, mode: bool = True) -> "Expert":
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)


def opened(name: str) -> Any:
    """Returns a timm model with its weights. Raises CheckpointError if it cannot be loaded."""
    config, directory = config_of(name), directory_of(name)
    if directory is None:
        with quiet_hub(), naming_failure(f"no weights of {name}", kind=CheckpointError):
            return config.create(pretrained=True)
    with naming_failure(f"the weights of {name} do not fit", kind=CheckpointError):
        model = with_classes(config).create()
        model.load_state_dict(own_weights(name, directory))
    return model
