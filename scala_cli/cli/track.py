"""Sends the figures of a training run to TensorBoard or Weights & Biases."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from scala_cli.errors import ScalaError
from scala_cli.slicing.point import Point
from scala_cli.watch import is_first

Service = Literal["tensorboard", "wandb"]


class Tracker(ABC):
    """Sends losses and metrics, over the number of training images so far."""

    def __init__(self) -> None:
        self.images = 0
        """Training images so far, those of a resumed run's earlier part included."""

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

    @abstractmethod
    def write(self, figures: Mapping[str, float]) -> None:
        """Sends figures by name."""

    @abstractmethod
    def close(self) -> None:
        """Sends what is still waiting."""


class TensorBoard(Tracker):
    """Writes event files; see them with `tensorboard --logdir DIRECTORY`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.writer: Any = None

    def write(self, figures: Mapping[str, float]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # what a run recorded after the state that it resumes from is hidden
            self.writer = SummaryWriter(str(self.directory), purge_step=self.images)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, self.images)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB(Tracker):
    """Sends to the project `scala` of Weights & Biases; a resumed run goes on where it was."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run
        self.run: Any = None

    def write(self, figures: Mapping[str, float]) -> None:
        if self.run is None:
            import wandb

            began = (self.path / "args.yaml").stat().st_mtime_ns  # written once, when a run begins
            own = sha256(f"{self.path} {began}".encode()).hexdigest()[:12]
            self.run = wandb.init(
                project="scala", name=self.path.name, id=own, resume="allow", dir=self.path.parent
            )
        self.run.log({**figures, "images": self.images})

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


@contextmanager
def tracking(service: Service | None, run: Path) -> Iterator[Tracker | None]:
    """Yields the tracker of a run; TensorBoard's files go to tensorboard/NAME beside the run directory.

    Raises ScalaError if the service's package is not installed.
    """
    if service and find_spec(service) is None:
        raise ScalaError(f"--log-to {service} needs {service}.", f"pip install {service}")
    if not service or not is_first():
        yield None
        return
    run = run.resolve()  # runs/last is a link
    beside = run.parent / "tensorboard" / run.name
    tracker = TensorBoard(beside) if service == "tensorboard" else WandB(run)
    try:
        yield tracker
    finally:
        tracker.close()
