"""The training loop, one for all methods. It computes and saves; it prints nothing."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from random import Random

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import Tensor

from scala_cli.data import Loader
from scala_cli.device import autocast
from scala_cli.errors import TrainingError
from scala_cli.evaluate import evaluate
from scala_cli.methods import Method
from scala_cli.methods.base import Teacher
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import AugmentSettings, DeviceSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.training.run import Row, Run, mean_top1
from scala_cli.watch import Watcher


def train(
    net: SlimmableViT,
    teacher: Teacher | None,
    method: Method,
    loaders: tuple[Loader, Loader],
    settings: Settings,
    run: Run,
    record: Record,
    watch: Watcher,
) -> Row:
    """Trains `net` in place and returns the row of the best epoch.

    Goes on from the last whole epoch in the run directory, if there is one.

    Args:
        teacher: the frozen full-width model, or None.
        loaders: training and validation batches.
        record: what to save beside the weights; its metrics are filled in.

    Raises:
        TrainingError: where a loss is not finite; the last epoch's checkpoints stay.
    """
    training, validation = loaders
    device = next(net.parameters()).device
    chosen = settings.optimizer
    optimizer = create_optimizer_v2(
        net.vit,
        opt=chosen.opt,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        layer_decay=chosen.layer_decay,
    )
    warmup = chosen.warmup_epochs if chosen.warmup_epochs is not None else chosen.epochs / 20
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=chosen.epochs,
        warmup_epochs=warmup,  # type: ignore[arg-type]  # fractions of an epoch are well defined
        warmup_lr=chosen.min_lr,
        min_lr=chosen.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(training),
    )
    average = ModelEmaV3(net.vit, decay=chosen.model_ema_decay, use_warmup=True) if chosen.model_ema else None
    judged = SlimmableViT(average.module, net.spec, net.rule) if average else net
    mix = mixer(settings.augment, settings.method.smoothing, net.spec.num_classes)

    def student(images: Tensor, point: Point) -> Tensor:
        with autocast(device, settings.device):
            return net(images, point).float()

    state = run.read_state()
    rows: list[Row] = state["rows"]
    if rows:
        net.vit.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.module.load_state_dict(state["average"])

    def state_now() -> dict[str, object]:
        return {
            "settings": asdict(settings),
            "weights": net.vit.state_dict(),
            "average": average.module.state_dict() if average else None,
            "optimizer": optimizer.state_dict(),
            "rows": rows,
        }

    for epoch in range(len(rows), chosen.epochs):
        random_seed(settings.seed * 1_000_003 + epoch)
        training.epoch = epoch
        net.train()
        step = epoch * len(training)
        scheduler.step_update(step)
        watch.phase(f"epoch {epoch + 1}/{chosen.epochs}", len(training) * training.batch_size)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        seen, began, lr = 0, time.perf_counter(), optimizer.param_groups[0]["lr"]
        for images, targets in training:
            images, targets = mix(images.to(device, non_blocking=True), targets.to(device, non_blocking=True))
            losses = {}
            for name, loss in method.passes(
                student, images, targets, teacher, Random(f"{settings.seed} {step}")
            ):
                loss.backward()
                losses[name] = loss.detach()
            values = {name: loss.item() for name, loss in losses.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the loss of width {name} is {value} at step {step + 1} (epoch {epoch + 1}).",
                        f"Lower --lr (now {chosen.lr:g}); what is saved in {run.path} is whole.",
                    )
                sums[name] += value
                counts[name] += 1
            if chosen.clip_grad:
                dispatch_clip_grad(net.vit.parameters(), chosen.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if average:
                average.update(net.vit, step)
            lr = optimizer.param_groups[0]["lr"]
            scheduler.step_update(step)
            seen += len(images)
            watch.step(len(images), values)
        rate = seen / (time.perf_counter() - began)
        points = evaluate(judged, validation, net.points, settings.device, watch)
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "images_per_sec": round(rate, 2),
            "loss": {name: sums[name] / counts[name] for name in sorted(sums, reverse=True)},
            "points": points,
        }
        rows.append(row)
        run.save_epoch(judged, record, rows, state_now())
        watch.epoch(row)
    return max(rows, key=mean_top1)


def mixer(
    augment: AugmentSettings, smoothing: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup and cutmix of a batch where asked for; they pair images, so an odd one out is dropped."""
    if not (augment.mixup or augment.cutmix):
        return lambda images, targets: (images, targets)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2
        return mixup(images[:even], targets[:even])

    return mix


def frozen(net: SlimmableViT, settings: DeviceSettings) -> Teacher:
    """The full-width model of a net as a teacher."""
    vit = net.vit.eval().requires_grad_(False)
    device = next(vit.parameters()).device

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        with autocast(device, settings):
            return vit(images).float()

    return teach
