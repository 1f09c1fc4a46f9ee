"""Logs gradient norms of the widths and the cosines between them, on the weights that they share."""

import json
from collections.abc import Iterable
from itertools import combinations, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from scala_cli.files import whole_file


class GradientLog:
    """Separates the gradients of a step's passes, and writes one line of JSON per step.

    {"step", "norm": {width: norm}, "cosine": {"width,width": cosine}}. The gradient of a narrow width is zero
    for the channels that it lacks, so cosines compare gradients of the whole model.

    Args:
        file: the log; its complete lines of steps before `first` are kept.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], file: Path, first: int = 0) -> None:
        self.parameters, self.file = list(parameters), file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = takewhile(lambda line: line.endswith("\n"), lines)
        kept = [line for line in whole if json.loads(line)["step"] < first]
        with whole_file(file) as target:  # drops steps logged after the state that a run resumes from
            target.write_text("".join(kept), encoding="utf-8")
        self.so_far: Tensor | None = None
        self.passes: dict[str, Tensor] = {}

    def add(self, name: str) -> None:
        """Adds the gradient of a pass after its backward, as the change of the accumulated gradient."""
        total = torch.cat(
            [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters]
        )
        own = total if self.so_far is None else total - self.so_far
        self.passes[name] = own + self.passes.get(name, 0)  # a batch may be processed in parts
        self.so_far = total

    def write(self, step: int) -> None:
        """Writes the line of a step, after its last pass."""
        norms = {name: gradient.norm().item() for name, gradient in self.passes.items()}
        cosines = {
            f"{one},{other}": torch.cosine_similarity(self.passes[one], self.passes[other], dim=0).item()
            for one, other in combinations(self.passes, 2)
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "norm": norms, "cosine": cosines}) + "\n")
        self.passes, self.so_far = {}, None
