"""How the widths pull at the weights they share: gradient norms and cosines."""

import json
from collections.abc import Iterable
from itertools import combinations, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from scala_cli.files import whole_file


class GradientLog:
    """Takes the gradients of each pass of a step apart, and writes one line of JSON a step.

    {"step", "norm": {width: norm}, "cosine": {"width,width": cosine}}; a narrow pass has zeros where its
    width has no channels, so the cosine is that of what both do to the whole model.

    Args:
        file: what it holds of the steps before `first` is kept, up to a line that was not written whole.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], file: Path, first: int = 0) -> None:
        self.parameters, self.file = list(parameters), file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = takewhile(lambda line: line.endswith("\n"), lines)
        kept = [line for line in whole if json.loads(line)["step"] < first]
        with whole_file(file) as target:  # without what a run that is resumed had logged of its next epoch
            target.write_text("".join(kept), encoding="utf-8")
        self.so_far: Tensor | None = None
        self.passes: dict[str, Tensor] = {}

    def add(self, name: str) -> None:
        """After the backward of a pass: its gradient is what was added to the sum."""
        total = torch.cat(
            [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters]
        )
        own = total if self.so_far is None else total - self.so_far
        self.passes[name] = own + self.passes.get(name, 0)  # a batch may come in parts
        self.so_far = total

    def write(self, step: int) -> None:
        """After the last pass of a step."""
        norms = {name: gradient.norm().item() for name, gradient in self.passes.items()}
        cosines = {
            f"{one},{other}": torch.cosine_similarity(self.passes[one], self.passes[other], dim=0).item()
            for one, other in combinations(self.passes, 2)
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "norm": norms, "cosine": cosines}) + "\n")
        self.passes, self.so_far = {}, None
