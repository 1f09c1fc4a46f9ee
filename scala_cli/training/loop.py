"""The training loop, one for all methods. It computes and saves; it prints nothing."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from random import Random
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import Tensor

from scala_cli.data import Loader, Split, transform_for
from scala_cli.device import autocast, choose_device, uses_bfloat16
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
from scala_cli.watch import Watcher


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
        choose_attention(start.vit, self.device, uses_bfloat16(self.device, settings.device))
        self.method = METHODS[settings.method.method](start.points, settings.method)
        self.net = deepcopy(start).to(self.device)
        self.frozen = start.vit.to(self.device).eval().requires_grad_(False) if taught else None
        chosen = settings.optimizer
        low, high = settings.augment.scale
        if not 0 < low <= high <= 1:
            raise TrainingError(
                f"--scale {low:g} {high:g} is no range.", "Give the smaller share first: 0.5 1"
            )
        try:
            augmented, plain = transform_for(start.spec, settings.augment), transform_for(start.spec)
            self.training = Loader(
                splits[0], augmented, chosen.batch_size, settings.read, training=True, seed=settings.seed
            )
            self.validation = Loader(splits[1], plain, chosen.batch_size, settings.read)
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
        self.steps = max(1, round(chosen.epochs * an_epoch))
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
        self.gradients: GradientLog | None = None

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on after the last whole epoch."""
        return {
            "settings": asdict(self.settings),
            "taught": self.frozen is not None,
            "weights": self.net.vit.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows = state["rows"]
        self.net.vit.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.module.load_state_dict(state["average"])

    def train(self, run: Run, record: Record, watch: Watcher) -> Row:
        """Trains the epochs that are left, saves each, and returns the row of the best.

        Args:
            record: what to save beside the weights; its metrics are filled in.

        Raises:
            TrainingError: where a loss is not finite; what was saved before stays.
        """
        if self.settings.log_grads:
            first = len(self.rows) * len(self.training)
            self.gradients = GradientLog(self.net.vit.parameters(), run.path / GRADIENTS, first)
        for epoch in range(len(self.rows), math.ceil(self.steps / len(self.training))):
            row = self.train_epoch(epoch, watch)
            row["points"] = evaluate(
                self.judged, self.validation, self.net.points, self.settings.device, watch
            )
            self.rows.append(row)
            run.save_epoch(self.judged, record, self.rows, self.state())
            watch.epoch(row)
        for loader in (self.training, self.validation):
            loader.tell_skipped(watch)
        return max(self.rows, key=mean_top1)

    def train_epoch(self, epoch: int, watch: Watcher) -> Row:
        """Passes over the training images once, or over what is left of the last epoch.

        All that is random depends on seed, epoch and step alone.
        """
        random_seed((self.settings.seed * 1_000_003 + epoch) % 2**32)
        self.training.epoch = epoch
        self.net.train()
        step = epoch * len(self.training)
        self.scheduler.step_update(step)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        seen, lr, began = 0, 0.0, time.perf_counter()
        left = min(self.steps - step, len(self.training))
        of = f"epoch {epoch + 1}/{math.ceil(self.steps / len(self.training))}"
        watch.phase(of, left * self.training.batch_size)
        for images, targets in islice(self.training, left):
            lr = self.optimizer.param_groups[-1]["lr"]
            losses = self.train_step(images, targets, step)
            step += 1
            self.scheduler.step_update(step)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss of width {name} is {loss} at step {step} ({of}).",
                        f"Lower --lr (now {self.settings.optimizer.lr:g}). What was saved before is whole.",
                    )
                sums[name] += loss
                counts[name] += 1
            seen += len(images)
            watch.step(len(images), losses)
        seconds = time.perf_counter() - began
        return {
            "epoch": epoch + 1,
            "lr": lr,
            "images_per_sec": round(seen / seconds, 2),
            "minutes": round(seconds / 60, 3),
            "loss": {name: sums[name] / counts[name] for name in sums},
        }

    def train_step(self, images: Tensor, targets: Tensor, step: int) -> dict[str, float]:
        """Every pass of the method on one batch, then one step of the optimizer. Returns their losses."""
        images, targets = (
            images.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )
        images, targets = self.mix(images, targets)
        random = Random(f"{self.settings.seed} {step}")
        teacher = self.teach if self.frozen else None
        losses = {}
        for name, loss in self.method.passes(self.predict, images, targets, teacher, random):
            loss.backward()
            losses[name] = loss.detach()
            if self.gradients:
                self.gradients.add(name)
        if self.gradients:
            self.gradients.write(step)
        if self.settings.optimizer.clip_grad:
            dispatch_clip_grad(self.net.vit.parameters(), self.settings.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.net.vit, step + 1)
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
