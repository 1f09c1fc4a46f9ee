"""The training loop, one for all methods. It computes and saves; it prints nothing."""

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import islice
from random import Random
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import Tensor

from scala_cli.data.loader import Loader, transform_for
from scala_cli.data.split import Split
from scala_cli.device import autocast, choose_device, naming_lack_of_memory, uses_bfloat16
from scala_cli.errors import TrainingError
from scala_cli.evaluate import evaluate
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import choose_attention
from scala_cli.settings import AugmentSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.training.gradients import GradientLog
from scala_cli.training.run import GRADIENTS, Row, Run, mean_top1
from scala_cli.watch import Stopped, Watcher
from scala_cli.world import World

SECONDS_BETWEEN_SAVES = 180.0


@dataclass
class Epoch:
    """What has been counted of an epoch so far."""

    images: int = 0
    seconds: float = 0.0
    losses: dict[str, tuple[int, float]] = field(default_factory=dict)
    """name of a pass -> how often, and the sum"""

    def count(self, images: int, losses: Mapping[str, float], seconds: float) -> None:
        """Counts one step in."""
        self.images, self.seconds = self.images + images, self.seconds + seconds
        for name, loss in losses.items():
            often, total = self.losses.get(name, (0, 0.0))
            self.losses[name] = often + 1, total + loss

    def row(self) -> Row:
        """The epoch's means."""
        return {
            "images_per_sec": round(self.images / self.seconds, 2),
            "minutes": round(self.seconds / 60, 3),
            "loss": {name: total / often for name, (often, total) in self.losses.items()},
        }


class Trainer:
    """One run's model, data and optimizer, ready to train.

    Building it checks all the settings against the model, the data and this machine; nothing is written.

    Args:
        start: the model to start from; its full width, frozen, is the teacher where `taught`.
        splits: training and validation images.

    Raises:
        TrainingError: settings that timm refuses. Other kinds of ScalaError for device, data and widths.
    """

    def __init__(
        self, start: SlimmableViT, taught: bool, settings: Settings, splits: tuple[Split, Split]
    ) -> None:
        self.settings, self.device = settings, choose_device(settings.device)
        self.world = World.join(self.device)
        choose_attention(start.vit, self.device, uses_bfloat16(self.device, settings.device))
        self.method = METHODS[settings.method.method](start.points, settings.method)
        self.net = deepcopy(start).to(self.device)
        self.frozen = start.vit.to(self.device).eval().requires_grad_(False) if taught else None
        for model in (self.net, self.frozen):
            if model:
                self.world.agree(model)
        chosen = settings.optimizer
        low, high = settings.augment.scale
        if not 0 < low <= high <= 1:
            raise TrainingError(
                f"--scale {low:g} {high:g} is no range.", "Give the smaller share first: 0.5 1"
            )
        try:
            augmented, plain = transform_for(start.spec, settings.augment), transform_for(start.spec)
            self.training = Loader(
                splits[0],
                augmented,
                chosen.batch_size,
                settings.read,
                training=True,
                seed=settings.seed,
                world=self.world,
            )
            self.validation = Loader(splits[1], plain, chosen.batch_size, settings.read, world=self.world)
            self.mix = mixer(settings.augment, settings.method.smoothing, start.spec.num_classes)
            self.optimizer = create_optimizer_v2(
                self.net.vit,
                opt=chosen.opt,
                lr=chosen.lr,
                weight_decay=chosen.weight_decay,
                layer_decay=chosen.layer_decay,
            )
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"timm refuses these settings: {error}.", "See scala finetune -h") from None
        an_epoch = len(self.training)
        if not an_epoch:
            raise TrainingError(
                f"{len(splits[0])} images are too few for {self.world.size} processes.", "Start fewer."
            )
        self.steps = max(1, round(chosen.epochs * an_epoch))
        self.epochs = math.ceil(self.steps / an_epoch)
        warmup = chosen.warmup_epochs if chosen.warmup_epochs is not None else chosen.epochs / 20
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=self.steps / an_epoch,  # type: ignore[arg-type]  # fractions are well defined
            warmup_epochs=min(warmup, chosen.epochs),  # type: ignore[arg-type]
            warmup_lr=chosen.min_lr,
            min_lr=chosen.min_lr,
            step_on_epochs=False,
            updates_per_epoch=an_epoch,
        )
        self.average = (
            ModelEmaV3(self.net.vit, decay=chosen.model_ema_decay, use_warmup=True)
            if chosen.model_ema
            else None
        )
        self.judged = SlimmableViT(self.average.module, start.spec, start.rule) if self.average else self.net
        self.rows: list[Row] = []
        self.step, self.epoch = 0, Epoch()
        self.gradients: GradientLog | None = None

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on after the last step."""
        return {
            "settings": asdict(self.settings),
            "taught": self.frozen is not None,
            "images_per_step": self.images_per_step,
            "weights": self.net.vit.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "step": self.step,
            "epoch": asdict(self.epoch),
        }

    @property
    def images_per_step(self) -> int:
        """Of all processes together."""
        return self.training.batch_size * self.world.size

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows, self.step, self.epoch = state["rows"], state["step"], Epoch(**state["epoch"])
        self.net.vit.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.module.load_state_dict(state["average"])

    def train(self, run: Run, record: Record, watch: Watcher) -> Row:
        """Trains what is left, saves every epoch and between, and returns the row of the best.

        Args:
            record: what to save beside the weights; its metrics are filled in.

        Raises:
            TrainingError: where a loss is not finite; what was saved before stays.
            Stopped: where the watcher asks for it, after saving.
        """
        if self.settings.log_grads and self.world.rank == 0:
            self.gradients = GradientLog(self.net.vit.parameters(), run.path / GRADIENTS, self.step)
        try:
            with watch.between_steps():
                while len(self.rows) < self.epochs:
                    row = self.train_epoch(run, watch)
                    points = evaluate(
                        self.judged,
                        self.validation,
                        self.net.points,
                        self.settings.device,
                        watch,
                        self.world,
                    )
                    self.rows.append({**row, "points": points})
                    self.epoch = Epoch()
                    run.save_epoch(self.judged, record, self.rows, self.state())
                    watch.epoch(self.rows[-1])
        except Stopped:
            run.write_state(self.state())
            raise
        for loader in (self.training, self.validation):
            loader.tell_skipped(watch)
        return max(self.rows, key=mean_top1)

    def train_epoch(self, run: Run, watch: Watcher) -> Row:
        """Passes over what is left of the training images of this epoch, and of the run, once.

        All that is random depends on the seed and the number of the step, the epoch and the image alone.
        """
        number, so_far = len(self.rows), self.epoch
        first, last = (
            self.step - number * len(self.training),
            min(self.steps, (number + 1) * len(self.training)),
        )
        of = f"epoch {number + 1}/{self.epochs}"
        watch.phase(of, (last - self.step) * self.images_per_step)
        self.net.train()
        self.scheduler.step_update(self.step)
        lr = self.optimizer.param_groups[-1]["lr"]
        began = saved = time.perf_counter()
        for images, targets in islice(self.training.of_epoch(number, first), last - self.step):
            lr = self.optimizer.param_groups[-1]["lr"]
            with naming_lack_of_memory(len(images)):
                losses = self.train_step(images, targets)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss of width {name} is {loss} at step {self.step} ({of}).",
                        f"Lower --lr (now {self.settings.optimizer.lr:g}). What was saved before is whole.",
                    )
            now = time.perf_counter()
            so_far.count(len(images) * self.world.size, losses, now - began)
            began = now
            if self.is_due(now - saved):
                run.write_state(self.state())
                saved = time.perf_counter()
            watch.step(len(images) * self.world.size, losses)
        return {"epoch": number + 1, "lr": lr, **so_far.row()}

    def is_due(self, seconds: float) -> bool:
        """Whether to save now, so many seconds after the last time."""
        every = self.settings.optimizer.save_every_steps
        return self.step % every == 0 if every else seconds > SECONDS_BETWEEN_SAVES

    def train_step(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        """Every pass of the method on one batch, then one step of the optimizer. Returns their losses."""
        random_seed((self.settings.seed * 1_000_003 + self.step) % 2**32)
        images, targets = (
            images.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )
        images, targets = self.mix(images, targets) if len(images) else (images, targets)
        teacher = self.teach if self.frozen else None
        losses: dict[str, Tensor] = {}
        parts = self.settings.optimizer.grad_accum_steps
        for some, their in zip(images.chunk(parts), targets.chunk(parts), strict=True) if len(images) else ():
            random = Random(f"{self.settings.seed} {self.step}")  # every part at the same widths
            for name, loss in self.method.passes(self.predict, some, their, teacher, random):
                share = loss * (len(some) / len(images))
                share.backward()
                losses[name] = losses.get(name, 0) + share.detach()
                if self.gradients:
                    self.gradients.add(name)
        if self.gradients:
            self.gradients.write(self.step)
        if not len(images):  # not one of them could be read
            for parameter in self.net.vit.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.world.average_gradients(self.net.vit.parameters())
        if self.settings.optimizer.clip_grad:
            dispatch_clip_grad(self.net.vit.parameters(), self.settings.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.average:
            self.average.update(self.net.vit, self.step)
        return {name: loss.item() for name, loss in losses.items()}

    def predict(self, images: Tensor, point: Point) -> Tensor:
        """The model's logits at a width, (B, classes) in float32."""
        with autocast(self.device, self.settings.device):
            return self.net(images, point).float()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The frozen starting model's logits, (B, classes) in float32."""
        assert self.frozen is not None
        with autocast(self.device, self.settings.device):
            return self.frozen(images).float()


def mixer(
    augment: AugmentSettings, smoothing: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup and cutmix of a batch where asked for; they pair images, so an odd one out is dropped."""
    if not (augment.mixup or augment.cutmix):
        return lambda images, targets: (images, targets)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2
        return mixup(images[:even], targets[:even]) if even else (images, targets)

    return mix
