"""How fast a method trains, beside plain timm training of the full width, in one run."""

import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor

from scala_cli.device import choose_device
from scala_cli.memory import naming_lack_of_memory, peak_memory
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import choose_attention, random_images
from scala_cli.precision import autocast, note_emulation, uses_bfloat16
from scala_cli.settings import Settings
from scala_cli.tasks import task_named
from scala_cli.tasks.base import Task
from scala_cli.timing import conditions, take_turns
from scala_cli.training.price import Macs, training_macs
from scala_cli.training.step import Step, compiling
from scala_cli.watch import Watcher

WARMUP_ROUNDS = 3


def bench_training(
    net: SlimmableViT, task: str, settings: Settings, rounds: int, watch: Watcher
) -> dict[str, Any]:
    """Times steps on random images, in turns, so that a machine that heats up or is shared slows all alike.

    Args:
        task: a name of tasks.TASKS.
        rounds: how often each step is timed.

    Returns:
        {"device", "threads", "precision", "torch", "timm", "batch_size", "runs", "steps"}; the steps are
        timm's, the method's without a teacher (where there are labels) and, as from pretrained weights, with
        one. Per step {"step", "images_per_sec", "cost_ratio", "efficiency", "mb_per_image"}: the median; the
        multiply-accumulates of an image relative to timm's; images/s times that relative to timm's images/s,
        which is 1 where training many widths costs no more than timm's arithmetic for them, some of which is
        skipped (`modes.skip_unread`); and by how much memory peaks above what was held before, divided by the
        images of the batch, where the system tells.
    """
    device = choose_device(settings.device)
    note_emulation(device, settings.device, watch)
    size = settings.optimizer.batch_size
    images = random_images(net.spec, size).to(device)
    targets = (torch.arange(size) % max(1, net.spec.num_classes)).to(device)
    purpose = task_named(task)
    step = Step(net, purpose, net, settings, device)
    step.net.train()
    teacher = step.frozen
    plain = plain_step(net, purpose, settings, device, None if purpose.labelled else step.teach(images))

    def run_method(frozen: VisionTransformer | None) -> None:
        step.frozen = frozen
        step(images, targets)

    calls: dict[str, Callable[[], object]] = {"timm": partial(plain, images, targets)}
    calls |= {"scala": partial(run_method, None)} if purpose.labelled else {}
    calls["scala, taught"] = partial(run_method, teacher)
    watch.phase("warm up", WARMUP_ROUNDS * len(calls), "steps")
    with compiling(settings), naming_lack_of_memory(size):  # which the first steps show
        take_turns(calls, WARMUP_ROUNDS, device, watch)
        peaks = {name: peak_memory(device, call) for name, call in calls.items()}
    watch.phase("time", rounds * len(calls), "steps")
    times = take_turns(calls, rounds, device, watch)

    macs = Macs.of(net)
    spent = {"scala": False, "scala, taught": True}  # whether it is taught
    ratios = {
        name: training_macs(macs, settings.method, task, spent[name]) / (3 * macs.full)
        if name in spent
        else 1.0
        for name in calls
    }
    speeds = {name: size / statistics.median(series) * 1000 for name, series in times.items()}
    rows = [
        {
            "step": name,
            "images_per_sec": round(speeds[name], 2),
            "cost_ratio": round(ratios[name], 4),
            "efficiency": round(speeds[name] * ratios[name] / speeds["timm"], 3),
            "mb_per_image": None if peak is None else round(peak / size / 1e6, 2),
        }
        for name, peak in peaks.items()
    ]
    told = conditions(device, uses_bfloat16(device, settings.device))
    return {**told, "batch_size": size, "runs": rounds, "steps": rows}


def plain_step(
    net: SlimmableViT, task: Task, settings: Settings, device: torch.device, lesson: Tensor | None
) -> Callable[[Tensor, Tensor], None]:
    """The usual training step of the full-width timm model, under the same conditions as the method's.

    Args:
        lesson: what is learnt instead of labels.
    """
    vit, chosen = deepcopy(net.vit).to(device).train(), settings.optimizer
    choose_attention(vit, device, uses_bfloat16(device, settings.device))
    vit.set_grad_checkpointing(chosen.grad_checkpointing)
    run = torch.compile(task.forward, dynamic=False) if chosen.torchcompile else task.forward
    optimizer = create_optimizer_v2(
        vit, opt=chosen.opt or task.opt, lr=chosen.lr, weight_decay=chosen.weight_decay
    )
    average = ModelEmaV3(vit, decay=chosen.model_ema_decay, use_warmup=True)

    def step(images: Tensor, targets: Tensor) -> None:
        with autocast(device, settings.device):
            output = run(vit, images).float()
        task.loss(output, targets if lesson is None else None, lesson, settings.method).backward()
        if chosen.clip_grad:
            dispatch_clip_grad(vit.parameters(), chosen.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        average.update(vit, 1)

    return step
