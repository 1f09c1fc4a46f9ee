"""The run directory: all files of a training run. Every write is atomic, so it can be resumed at any time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import yaml_dump

from scala_cli.errors import ScalaError, TrainingError
from scala_cli.files import clear, refuse_occupied, whole_file
from scala_cli.lock import LOCK, locked
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.locate import CARD, CHECKPOINT_FILES, LAST_RUN, STATE
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.report import write_csv
from scala_cli.settings import Settings
from scala_cli.slicing.point import Point
from scala_cli.swap import remove, restore, target_of, temporary
from scala_cli.tasks.base import Task
from scala_cli.watch import is_first

Row = dict[str, Any]
"""One epoch: {"epoch", "lr", "images_per_sec", "minutes", "loss": {name: mean},
"points": [{"ratio", "top1", ...}]}; "minutes" excludes evaluation."""

ARGS, METRICS, GRADIENTS, FORMAT = "args.yaml", "metrics.jsonl", "grads.jsonl", 6
CHECKPOINTS = ("start", "last", "best")
OF_RUN = {STATE, METRICS, GRADIENTS, "summary.csv", ARGS, LOCK}
OF_RUN |= {f"{name}/{file}" for name in CHECKPOINTS for file in CHECKPOINT_FILES - {CARD}}
RUN_FILES = OF_RUN | {f"teacher/{file}" for file in OF_RUN}
"""All files of a run, as paths in its directory."""
RUN_NAMES = {Path(file).parts[0] for file in RUN_FILES}


@dataclass(frozen=True)
class Run:
    """A run directory.

    The checkpoint directories `start/`, `last/` and `best/` hold the model before training, after the last
    and after the best epoch; `teacher/` the model that teaches, if it is not the start; `state.pt` the state
    to resume from; `metrics.jsonl` and `summary.csv` the epochs so far.

    Args:
        newest: whether to point runs/last here after the first epoch.
        writes: whether this process writes the run; the other processes of torchrun only read it.
    """

    path: Path
    newest: bool = False
    writes: bool = field(default_factory=is_first)

    @property
    def teacher(self) -> "Run":
        """The run in which the full width alone learns new classes; its last checkpoint is the teacher.

        If instead fitting or added modules changed the start's full width, it holds only that checkpoint: the
        unchanged model.
        """
        return Run(self.path / "teacher", writes=self.writes)

    @property
    def weights(self) -> Path:
        """The checkpoint to use if the run cannot be resumed: that of the last epoch, else the start."""
        return self.path / ("last" if (self.path / "last").is_dir() else "start")

    @contextmanager
    def claimed(self, settings: Settings, force: bool) -> Iterator[None]:
        """Locks the directory for a new run; with `force`, removes an existing run.

        Raises ScalaError if it is occupied, or another process trains in it.
        """
        if not self.writes:
            yield
            return
        refuse_occupied(self.path, force, RUN_FILES, in_place=True)
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            refuse_occupied(
                self.path, force, RUN_FILES, in_place=True
            )  # another run may just have ended here
            try:
                clear(self.path, RUN_FILES - {LOCK})
                with whole_file(self.path / ARGS) as file:
                    text = yaml_dump(json.loads(json.dumps(asdict(settings))))
                    file.write_text(text, encoding="utf-8")
                yield
            except (ScalaError, OSError):
                self.discard_if_no_step_was_saved()
                raise

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks a run to resume, if there is one, and removes partly written files of a killed process.

        Raises TrainingError if another process trains it.
        """
        if not self.writes or not self.holds_state():
            yield
            return
        with locked(self.path):
            for name in CHECKPOINTS:
                restore(self.path / name)
            for path in [*self.path.iterdir()]:
                if target_of(path.name) in RUN_NAMES:
                    remove(path)
            yield

    def begin(self, start: SlimmableViT, record: Record, state: Mapping[str, Any]) -> None:
        """Saves the starting model and state, so that the run can be resumed from now on."""
        if self.writes:
            save(start, record, self.path / "start")
            self.write_state(state)

    def save_teacher(self, net: SlimmableViT, record: Record) -> None:
        """Saves the model that teaches, if it is not the starting model."""
        if self.writes:
            self.teacher.path.mkdir(exist_ok=True)
            save(net, record, self.teacher.path / "last")

    def read_teacher(self) -> SlimmableViT | None:
        """Returns the model that teaches; None if that is the starting model."""
        last = self.teacher.path / "last"
        return load(last) if last.is_dir() else None

    def make_newest(self) -> None:
        """Points runs/last here, if the working directory is writable."""
        with suppress(OSError):
            LAST_RUN.parent.mkdir(exist_ok=True)
            if LAST_RUN.is_symlink() or not LAST_RUN.exists():
                link = temporary(LAST_RUN)
                link.symlink_to(os.path.relpath(self.path.resolve(), LAST_RUN.parent.resolve()))
                link.replace(LAST_RUN)

    def discard_if_no_step_was_saved(self) -> None:
        """Removes the files of the run unless they hold a step to resume from."""
        parts = [part for part in (self, self.teacher) if part.holds_state()]
        # the state has no "step" while `teacher` learns classes
        if not any(part.read_state().get("step") for part in parts):
            clear(self.path, RUN_FILES)
            with suppress(OSError):
                self.path.rmdir()

    def save_epoch(
        self,
        net: SlimmableViT,
        record: Record,
        task: Task,
        rows: Sequence[Row],
        state: Mapping[str, Any],
    ) -> None:
        """Saves the model and its metrics, and finally the state to resume from."""
        if not self.writes:
            return
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
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with whole_file(self.path / "summary.csv") as file:
            write_csv(file, [flat(row, task) for row in rows])

    def write_state(self, state: Mapping[str, Any]) -> None:
        if self.writes:
            with whole_file(self.path / STATE) as file, file.open("wb") as handle:
                torch.save({**state, "format": FORMAT}, handle)

    def holds_state(self) -> bool:
        return (self.path / STATE).is_file()

    def read_state(self) -> dict[str, Any]:
        """Returns the state from `write_state`. Raises TrainingError if there is nothing to resume."""
        file = self.path / STATE
        if not self.holds_state():
            raise TrainingError(
                f"{self.path} has no {STATE}: there is nothing to resume.", remedy="start_run"
            )
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception:  # damaged bytes make the unpickler raise any kind of error
            raise TrainingError(f"{file} is damaged.", remedy="from_weights", weights=self.weights) from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise TrainingError(
                f"{file} was written by another version of scala.",
                remedy="from_weights",
                weights=self.weights,
            )
        return state


def flat(row: Row, task: Task) -> dict[str, Any]:
    """Returns a row as columns: loss_0.25, top1_0.25, top5_0.25, ..."""
    line = {key: row[key] for key in ("epoch", "lr", "images_per_sec")}
    line |= {f"loss_{name}": loss for name, loss in row["loss"].items()}
    for column in task.columns:
        line |= {f"{column}_{Point.of_row(point)}": point.get(column) for point in row["points"]}
    return line
