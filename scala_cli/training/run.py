"""A run directory: everything one training run leaves behind, whole at every moment."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import yaml_dump

from scala_cli.errors import ScalaError, TrainingError
from scala_cli.files import refuse_occupied, whole_file
from scala_cli.models.checkpoint import Record, save
from scala_cli.models.locate import LAST_RUN, STATE
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.report import write_csv
from scala_cli.settings import Settings
from scala_cli.slicing.point import Point
from scala_cli.tasks.base import Task

Row = dict[str, Any]
"""One epoch: {"epoch", "lr", "images_per_sec", "minutes", "loss": {name: mean},
"points": [{"ratio", "top1", ...}]}; the minutes are those of training, without evaluation."""

METRICS, GRADIENTS, FORMAT = "metrics.jsonl", "grads.jsonl", 4
FILES = {"teacher", "start", "last", "best", STATE, METRICS, GRADIENTS, "summary.csv", "args.yaml"}


@dataclass(frozen=True)
class Run:
    """One run directory.

    `start/` holds the model training started from, `last/` and `best/` what it became (all checkpoint
    directories); `teacher/` is a run of its own, where the head was new; `state.pt` what resuming needs;
    `metrics.jsonl` and `summary.csv` the epochs so far.

    Args:
        newest: whether runs/last is to point here once there is something to see.
    """

    path: Path
    newest: bool = False

    @property
    def teacher(self) -> "Run":
        """The run in which the full width alone learnt classes that are new to it."""
        return type(self)(self.path / "teacher")

    @property
    def weights(self) -> Path:
        """The checkpoint to go on from where the run itself cannot: the last epoch's, else the first."""
        return self.path / ("last" if (self.path / "last").is_dir() else "start")

    def claim(self, settings: Settings, force: bool) -> None:
        """Takes the directory, with `force` from a former run of which nothing is kept.

        Raises ScalaError where it is occupied.
        """
        refuse_occupied(self.path, force, FILES)
        self.discard()
        self.path.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path / "args.yaml") as file:
            file.write_text(yaml_dump(json.loads(json.dumps(asdict(settings)))))

    def begin(self, start: SlimmableViT, record: Record, state: Mapping[str, Any]) -> None:
        """Saves what training starts with, so that from here on it can be resumed."""
        save(start, record, self.path / "start")
        self.write_state(state)

    def make_newest(self) -> None:
        """Points runs/last here, where the working directory can be written to."""
        with suppress(OSError):
            LAST_RUN.parent.mkdir(exist_ok=True)
            if LAST_RUN.is_symlink() or not LAST_RUN.exists():
                with whole_file(LAST_RUN) as link:
                    link.symlink_to(os.path.relpath(self.path.resolve(), LAST_RUN.parent.resolve()))

    @contextmanager
    def free_if_nothing_comes_of_it(self) -> Iterator[None]:
        """Leaves the claimed directory free again where what is done within fails before it saves a step."""
        try:
            yield
        except (ScalaError, OSError):
            parts = [part for part in (self, self.teacher) if part.holds_state()]
            if not any(part.read_state().get("step") for part in parts):  # to learn classes is no step yet
                self.discard()
            raise

    def discard(self) -> None:
        """Removes all that a run writes."""
        self.sweep()
        for name in FILES:
            remove(self.path / name)
        with suppress(OSError):
            self.path.rmdir()

    def sweep(self) -> None:
        """Removes what a process that was killed had begun to write."""
        for name in FILES:
            for path in self.path.glob(f".{name}.*"):
                remove(path)

    def save_epoch(
        self,
        net: SlimmableViT,
        record: Record,
        task: Task,
        rows: Sequence[Row],
        state: Mapping[str, Any],
    ) -> None:
        """Saves the model, its metrics, and last of all the state to resume from."""
        newest = rows[-1]
        record = replace(record, metrics=newest["points"])
        save(net, record, self.path / "last")
        if newest is max(rows, key=task.score):
            save(net, record, self.path / "best")
        self.write_metrics(rows, task)
        self.write_state(state)
        if self.newest:
            self.make_newest()

    def write_metrics(self, rows: Sequence[Row], task: Task) -> None:
        with whole_file(self.path / METRICS) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with whole_file(self.path / "summary.csv") as file:
            write_csv(file, [flat(row, task) for row in rows])

    def write_state(self, state: Mapping[str, Any]) -> None:
        with whole_file(self.path / STATE) as file, file.open("wb") as handle:
            torch.save({**state, "format": FORMAT}, handle)

    def holds_state(self) -> bool:
        return (self.path / STATE).is_file()

    def read_state(self) -> dict[str, Any]:
        """What `write_state` wrote. Raises TrainingError where there is nothing to resume."""
        file = self.path / STATE
        if not self.holds_state():
            raise TrainingError(
                f"{self.path} has no {STATE}: there is nothing to resume.",
                "Start it: scala finetune MODEL --data DIR",
            )
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception:  # arbitrary bytes make the unpickler fail in arbitrary ways
            raise TrainingError(
                f"{file} is damaged.", f"Go on from its weights: scala finetune {self.weights} --data DIR"
            ) from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise TrainingError(
                f"{file} was written by another version of scala.",
                f"Go on from its weights: scala finetune {self.weights} --data DIR",
            )
        return state


class Reader(Run):
    """A run that another process writes."""

    def claim(self, settings: Settings, force: bool) -> None:
        pass

    def begin(self, start: SlimmableViT, record: Record, state: Mapping[str, Any]) -> None:
        pass

    @contextmanager
    def free_if_nothing_comes_of_it(self) -> Iterator[None]:
        yield

    def discard(self) -> None:
        pass

    def sweep(self) -> None:
        pass

    def save_epoch(
        self,
        net: SlimmableViT,
        record: Record,
        task: Task,
        rows: Sequence[Row],
        state: Mapping[str, Any],
    ) -> None:
        pass

    def write_state(self, state: Mapping[str, Any]) -> None:
        pass


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flat(row: Row, task: Task) -> dict[str, Any]:
    """A row as columns: loss_0.25, top1_0.25, top5_0.25, ..."""
    line = {key: row[key] for key in ("epoch", "lr", "images_per_sec")}
    line |= {f"loss_{name}": loss for name, loss in row["loss"].items()}
    for column in task.columns:
        line |= {f"{column}_{Point.of_row(point)}": point[column] for point in row["points"]}
    return line
