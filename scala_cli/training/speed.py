"""Measures the training speed of a method against plain timm training of the full width."""

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
from scala_cli.training.muon import fast_muon
from scala_cli.training.price import Macs, training_macs
from scala_cli.training.rates import default_optimizer
from scala_cli.training.step import Step, compiling
from scala_cli.watch import Watcher

WARMUP_ROUNDS = 3


def bench_training(
    net: SlimmableViT, task: str, settings: Settings, rounds: int, watch: Watcher
) -> dict[str, Any]:
    """Times steps on random images, in turns, so that heat or other load slows all of them equally.

    Args:
        task: a name of tasks.TASKS.
        rounds: how often each step is timed.

    Returns:
        {"device", "threads", "precision", "torch", "timm", "batch_size", "runs", "steps"}. The steps are
        timm's, the method's without a teacher (only with labels), and the method's with one. Each is {"step",
        "images_per_sec", "cost_ratio", "efficiency", "mb_per_image"}:

        images_per_sec: the median.
        cost_ratio: multiply-accumulates per image relative to timm's.
        efficiency: images/s times cost_ratio, relative to timm's images/s; 1 if a step takes as long as timm
            would for that many multiply-accumulates, of which a step skips some (`modes.skip_unread`).
        mb_per_image: peak memory above what was held before the step, divided by the batch size; None if the
            system does not report it.
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
    with compiling(settings), naming_lack_of_memory(size):  # errors of either kind show in the first steps
        take_turns(calls, WARMUP_ROUNDS, device, watch)
        peaks = {name: peak_memory(device, call) for name, call in calls.items()}
    watch.phase("time", rounds * len(calls), "steps")
    times = take_turns(calls, rounds, device, watch)

    macs = Macs.of(net)
    is_taught = {"scala": False, "scala, taught": True}
    ratios = {
        name: training_macs(macs, settings.method, task, is_taught[name]) / (3 * macs.full)
        if name in is_taught
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
    machine = conditions(device, uses_bfloat16(device, settings.device))
    return {**machine, "batch_size": size, "runs": rounds, "steps": rows}


def plain_step(
    net: SlimmableViT, task: Task, settings: Settings, device: torch.device, lesson: Tensor | None
) -> Callable[[Tensor, Tensor], None]:
    """Returns a usual training step of the full-width timm model, under the same conditions as the method's.

    Args:
        lesson: a teacher's output to learn instead of labels; None uses labels.
    """
    vit, chosen = deepcopy(net.vit).to(device).train(), settings.optimizer
    choose_attention(vit, device, uses_bfloat16(device, settings.device))
    vit.set_grad_checkpointing(chosen.grad_checkpointing)
    run = torch.compile(task.forward, dynamic=False) if chosen.torchcompile else task.forward
    optimizer = create_optimizer_v2(
        vit,
        opt=chosen.opt or default_optimizer(net, task),
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
    )
    average = ModelEmaV3(vit, decay=chosen.model_ema_decay, use_warmup=True)

    def step(images: Tensor, targets: Tensor) -> None:
        with autocast(device, settings.device):
            output = run(vit, images).float()
        task.loss(output, targets if lesson is None else None, lesson, settings.method).backward()
        if chosen.clip_grad:
            dispatch_clip_grad(vit.parameters(), chosen.clip_grad)
        with fast_muon(device):
            optimizer.step()
        optimizer.zero_grad()
        average.update(vit, 1)

    return step
