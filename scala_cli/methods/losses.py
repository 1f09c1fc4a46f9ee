"""The losses every method is made of."""

from torch import Tensor
from torch.nn import functional as F

from scala_cli.settings import MethodSettings


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy.

    Args:
        logits: (B, classes)
        targets: (B,) class numbers, or (B, classes) probabilities from mixup, which are smooth already.
        smoothing: label smoothing, for class numbers.
    """
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's prediction from the teacher's at temperature 1, mean over images.

    Args:
        student, teacher: (B, classes) logits; no gradient flows into the teacher's.
    """
    return F.kl_div(
        student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="batchmean", log_target=True
    )


def lesson_loss(
    logits: Tensor, lesson: Tensor | None, targets: Tensor | None, settings: MethodSettings
) -> Tensor:
    """What a width learns from: a teacher's logits, the labels at their weight beside it, or labels alone."""
    loss = logits.new_zeros(())
    if targets is not None:
        weight = 1.0 if lesson is None else settings.label_weight
        loss = loss + weight * cross_entropy(logits, targets, settings.smoothing)
    if lesson is not None:
        loss = loss + distillation(logits, lesson)
    return loss
