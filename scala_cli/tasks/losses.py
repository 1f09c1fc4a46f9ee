"""The losses that training methods combine."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy.

    Args:
        logits: (B, classes)
        targets: (B,) class numbers, or (B, classes) probabilities from mixup, which are smoothed already.
        smoothing: label smoothing, for class numbers.
    """
    return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the KL divergence of the student from the teacher at temperature 1, mean over images.

    Args:
        student, teacher: (B, classes) logits; no gradient flows into the teacher's.
    """
    return F.kl_div(
        student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="batchmean", log_target=True
    )


def mean_square(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Returns the mean squared difference over all elements; no gradient flows into the teacher's.

    Args:
        student, teacher: (..., C)
        counted: (...) which vectors count; by default all.
    """
    if counted is None:
        return F.mse_loss(student, teacher.detach())
    errors = F.mse_loss(student, teacher.detach(), reduction="none").mean(-1)
    return (errors * counted).sum() / counted.sum()
