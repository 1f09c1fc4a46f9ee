"""The training loop of all methods. It computes and saves; it prints nothing."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from scala_cli.data.calibration import calibration_images
from scala_cli.data.loader import Loader
from scala_cli.data.split import Split
from scala_cli.data.transform import transform_for
from scala_cli.data.workers import naming_a_dead_reader
from scala_cli.device import choose_device
from scala_cli.errors import LostProcess, ScalaError, TrainingError
from scala_cli.evaluate import evaluate
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import Settings
from scala_cli.tasks.base import Task
from scala_cli.training.gradients import GradientLog
from scala_cli.training.run import GRADIENTS, Row, Run
from scala_cli.training.step import Step, refusing_settings
from scala_cli.watch import Stopped, Watcher
from scala_cli.world import World

SECONDS_BETWEEN_SAVES = 180.0


@dataclass
class Epoch:
    """Totals of an epoch so far."""

    images: int = 0
    seconds: float = 0.0
    losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Name of a pass -> number of losses, and their sum."""

    def count(self, images: int, losses: Mapping[str, float], seconds: float) -> None:
        """Adds one step."""
        self.images, self.seconds = self.images + images, self.seconds + seconds
        for name, loss in losses.items():
            often, total = self.losses.get(name, (0, 0.0))
            self.losses[name] = often + 1, total + loss

    def row(self) -> Row:
        """Returns the epoch's means."""
        return {
            "images_per_sec": round(self.images / self.seconds, 2),
            "minutes": round(self.seconds / 60, 3),
            "loss": {name: total / often for name, (often, total) in self.losses.items()},
        }


class Trainer:
    """A run's model, data and optimizer, ready to train.

    Creating it checks all settings against the model, the data and this machine; nothing is written.

    Args:
        start: the model to start from.
        task: what the model is for.
        teacher: the model whose full width teaches, or None.
        splits: training and validation images.

    Raises:
        TrainingError: for settings that timm rejects. Other kinds of ScalaError for device, data and widths.
    """

    def __init__(
        self,
        start: SlimmableViT,
        task: Task,
        teacher: SlimmableViT | None,
        settings: Settings,
        splits: tuple[Split, Split],
    ) -> None:
        self.settings, self.task = settings, task
        device = choose_device(settings.device)
        self.world = World.join(device)
        self.step = Step(start, task, teacher, settings, device, self.world)
        chosen = settings.optimizer
        low, high = settings.augment.scale
        if not 0 < low <= high <= 1:
            raise TrainingError(
                f"scale {low:g} {high:g} is not a range.", "Give the smaller share first: 0.5 1"
            )
        with refusing_settings():
            augmented, plain = transform_for(start.spec, settings.augment), transform_for(start.spec)
        self.training = Loader(
            splits[0],
            augmented,
            chosen.batch_size,
            settings.read,
            training=True,
            seed=settings.run.seed,
            world=self.world,
        )
        self.validation = Loader(splits[1], plain, chosen.batch_size, settings.read, world=self.world)
        an_epoch = len(self.training)
        if not an_epoch:
            raise TrainingError(
                f"{len(splits[0])} images are too few for {self.world.size} processes.", "Start fewer."
            )
        self.steps = max(1, round(chosen.epochs * an_epoch))
        self.epochs = math.ceil(self.steps / an_epoch)
        warmup = chosen.warmup_epochs if chosen.warmup_epochs is not None else chosen.epochs / 20
        self.scheduler, _ = create_scheduler_v2(
            self.step.optimizer,
            num_epochs=self.steps / an_epoch,  # type: ignore[arg-type]  # fractions are well defined
            warmup_epochs=min(warmup, chosen.epochs),  # type: ignore[arg-type]
            warmup_lr=chosen.min_lr,
            min_lr=chosen.min_lr,
            step_on_epochs=False,
            updates_per_epoch=an_epoch,
        )
        self.rows: list[Row] = []
        self.epoch = Epoch()

    def measure(self, watch: Watcher) -> None:
        """Measures the statistics of the teacher's outputs that the loss needs, on some training images.

        Raises DataError if no image can be read, or all are the same.
        """
        if not self.task.labelled:
            split, read = self.training.split, self.settings.read
            self.step.measure(calibration_images(split, self.step.net.spec, read, watch))

    def state(self) -> dict[str, Any]:
        """Returns the state from which `restore` resumes after the last step."""
        return {**self.terms(), "rows": self.rows, "epoch": asdict(self.epoch), **self.step.state()}

    def terms(self) -> dict[str, Any]:
        """Returns the part of the state that stays the same throughout a run."""
        return {
            "settings": asdict(self.settings),
            "taught": self.step.frozen is not None,
            "images_per_step": self.images_per_step,
            "processes": self.world.size,
            "images": self.images(),
        }

    def images(self) -> dict[str, Any]:
        """Returns the numbers of training and validation images, and their classes."""
        training, validation = self.training.split, self.validation.split
        return {
            "training images": len(training),
            "validation images": len(validation),
            "classes": [*training.classes],
        }

    @property
    def images_per_step(self) -> int:
        """Number of images in a step, over all processes."""
        return self.training.batch_size * self.world.size

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows, self.epoch = state["rows"], Epoch(**state["epoch"])
        self.step.restore(state)

    def train(self, run: Run, record: Record, watch: Watcher) -> Row:
        """Trains the remaining epochs, saving during and after each, and returns the row of the best.

        Args:
            record: the record to save with the weights; its metrics are filled in.

        Raises:
            TrainingError: if a loss or a gradient is not finite; earlier saves are kept.
            ScalaError: if the device lacks memory for a step; DataError if an image cannot be read or a
                worker died. The state is saved first.
            Stopped: if the watcher asks to stop; LostProcess if another process is lost. The state is saved
                first.
        """
        if self.settings.run.log_grads and self.world.rank == 0:
            parameters = self.step.net.vit.parameters()
            self.step.gradients = GradientLog(parameters, run.path / GRADIENTS, self.step.number)
        first = self.step.number
        with watch.between_steps():  # includes the final save, so that it is not interrupted
            try:
                with naming_a_dead_reader():
                    self.train_epochs(run, record, watch)
            except (Stopped, LostProcess):  # raised between steps, or before a step changes the weights
                run.write_state(self.state())
                raise
            except TrainingError:
                raise  # it would occur again after resuming
            except ScalaError as error:
                error.resumable = True
                is_new = self.step.number > first and self.epoch.images  # steps that are not saved yet
                if is_new and not self.step.moving:
                    run.write_state(self.state())
                raise
        for loader in (self.training, self.validation):
            loader.tell_skipped(watch)
        return max(self.rows, key=self.task.score)

    def train_epochs(self, run: Run, record: Record, watch: Watcher) -> None:
        """Trains, evaluates and saves the remaining epochs."""
        while len(self.rows) < self.epochs:
            row = self.train_epoch(run, watch)
            points = evaluate(
                self.step.evaluated,
                self.task,
                self.validation,
                self.step.net.points,
                self.settings.device,
                watch,
                self.world,
                reference=None if self.task.labelled else self.step.answer,
            )
            self.rows.append({**row, "points": points})
            self.epoch = Epoch()
            run.save_epoch(self.step.evaluated, record, self.task, self.rows, self.state())
            watch.epoch(self.rows[-1])

    def train_epoch(self, run: Run, watch: Watcher) -> Row:
        """Trains on the remaining images of this epoch, at most to the last step of the run.

        All randomness depends only on the seed and the numbers of the step, the epoch and the image.
        """
        number, so_far = len(self.rows), self.epoch
        first, last = (
            self.step.number - number * len(self.training),
            min(self.steps, (number + 1) * len(self.training)),
        )
        of = f"epoch {number + 1}/{self.epochs}"
        # of the whole run, so that the time left is too
        watch.phase(of, self.steps * self.images_per_step, done=self.step.number * self.images_per_step)
        self.step.net.train()
        self.scheduler.step_update(max(self.step.number - 1, 0))
        lr = self.lr  # that of the last step, reported if this epoch has no steps left
        self.scheduler.step_update(self.step.number)
        began = saved = time.perf_counter()
        for images, targets in islice(self.training.of_epoch(number, first), last - self.step.number):
            lr = self.lr
            losses = self.step(images, targets)
            self.scheduler.step_update(self.step.number)
            now = time.perf_counter()
            so_far.count(len(images) * self.world.size, losses, now - began)
            began = now
            if self.is_due(now - saved):
                run.write_state(self.state())
                saved = time.perf_counter()
            watch.step(len(images) * self.world.size, losses)
        if not self.world.sum(torch.tensor(so_far.images, device=self.step.device)):
            raise self.training.nothing_read()
        return {"epoch": number + 1, "lr": lr, **so_far.row()}

    @property
    def lr(self) -> float:
        """The learning rate of the next step, before scaling for a layer or a weight."""
        group = self.step.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1)

    def is_due(self, seconds: float) -> bool:
        """Whether to save now, `seconds` after the last save."""
        every = self.settings.optimizer.save_every_steps
        return self.step.number % every == 0 if every else seconds > SECONDS_BETWEEN_SAVES
