"""Sends the figures of a training run to TensorBoard or Weights & Biases."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from scala_cli.errors import ScalaError
from scala_cli.slicing.point import Point
from scala_cli.watch import is_first

Service = Literal["tensorboard", "wandb"]


class Tracker(ABC):
    """Sends losses and metrics of a run, over the number of training images so far."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.images = 0
        """Training images so far, those of a resumed run's earlier part included."""
        self.client: Any = None

    def phase(self, done: int) -> None:
        """Starts a phase; in training after `done` images of the run, elsewhere after none."""
        self.images = max(self.images, done)

    def step(self, images: int, losses: Mapping[str, float]) -> None:
        """Records a step: its images, and the loss of every pass by name."""
        self.images += images
        self.write({f"loss/{name}": loss for name, loss in losses.items()})

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Records an epoch: a row of metrics.jsonl."""
        figures = {"lr": row["lr"], "images_per_sec": row["images_per_sec"]}
        for point in row["points"]:
            label = Point.of_row(point).label
            measured = point.keys() - {"ratio", "size", "keep", "images"}
            figures |= {f"{name}/{label}": point[name] for name in measured if point[name] is not None}
        self.write(figures)

    def write(self, figures: Mapping[str, float]) -> None:
        """Sends figures by name; the first ones start the service."""
        if self.client is None:
            self.client = self.begin()
        self.send(figures)

    def close(self) -> None:
        """Sends what is still waiting."""
        if self.client is not None:
            self.end()

    @abstractmethod
    def begin(self) -> Any:
        """Starts the service and returns its client."""

    @abstractmethod
    def send(self, figures: Mapping[str, float]) -> None:
        """Sends figures through the client."""

    @abstractmethod
    def end(self) -> None:
        """Closes the client."""


class TensorBoard(Tracker):
    """Writes event files to tensorboard/NAME beside the run; see them with `tensorboard --logdir`."""

    def begin(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # what a run recorded after the state that it resumes from is hidden
        beside = self.run.parent / "tensorboard" / self.run.name
        return SummaryWriter(str(beside), purge_step=self.images)

    def send(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.add_scalar(name, value, self.images)

    def end(self) -> None:
        self.client.close()


class WandB(Tracker):
    """Sends to the project `scala` of Weights & Biases; a resumed run goes on where it was."""

    def begin(self) -> Any:
        import wandb

        began = (self.run / "args.yaml").stat().st_mtime_ns  # written once, when a run begins
        own = sha256(f"{self.run} {began}".encode()).hexdigest()[:12]
        return wandb.init(project="scala", name=self.run.name, id=own, resume="allow", dir=self.run.parent)

    def send(self, figures: Mapping[str, float]) -> None:
        self.client.log({**figures, "images": self.images})

    def end(self) -> None:
        self.client.finish()


def tracker_of(service: Service | None, run: Path) -> Tracker | None:
    """Returns the tracker of a run; None without a service, and in all processes but the first.

    Raises ScalaError if the service's package is not installed.
    """
    if service and find_spec(service) is None:
        raise ScalaError(f"--log-to {service} needs {service}.", f"pip install {service}")
    if not service or not is_first():
        return None
    kind = {"tensorboard": TensorBoard, "wandb": WandB}[service]
    return kind(run.resolve())  # runs/last is a link
