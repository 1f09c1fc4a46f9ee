"""What each width costs: parameters, multiply-accumulates, milliseconds."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scala_cli.device import autocast, choose_device, device_name, synchronize
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import Spec, random_images
from scala_cli.settings import BenchSettings, DeviceSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher

WARMUP_ROUNDS, RUNS = 5, 50

Key = TypeVar("Key")

Predictor = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> logits (B, classes)"""


def cost(spec: Spec) -> dict[str, Any]:
    """Size and work of one image, counted on the skeleton of the model that a Spec describes.

    Returns:
        {"embed_dim", "num_heads", "params", "gmacs"}; GMACs are 1e9 multiply-accumulates, half the FLOPs.
    """
    skeleton = spec.build()
    with FlopCounterMode(display=False) as counter:
        skeleton(torch.empty(1, *spec.input_size, device="meta"))
    return {
        "embed_dim": spec.embed_dim,
        "num_heads": spec.num_heads,
        "params": sum(parameter.numel() for parameter in skeleton.parameters()),
        "gmacs": round(counter.get_total_flops() / 2e9, 4),
    }


@dataclass(frozen=True)
class Timing:
    """Latency of one batch in milliseconds, median and 95th percentile; throughput in images/s."""

    latency_ms: float
    latency_ms_p95: float
    throughput: float


@torch.inference_mode()
def time_models(
    models: Mapping[Point, nn.Module], images: Tensor, runs: int, watch: Watcher
) -> dict[Point, Timing]:
    """Times every model on one batch.

    The models take turns, so that a machine that heats up or is shared slows all alike; the first rounds
    are not counted.

    Args:
        images: (B, C, H, W), on the models' device.
        runs: how often each model is timed.
    """
    watch.phase("time", (WARMUP_ROUNDS + runs) * len(models), "runs")
    calls = {point: partial(model, images) for point, model in models.items()}
    take_turns(calls, WARMUP_ROUNDS, images.device, watch)
    times = take_turns(calls, runs, images.device, watch)
    return {point: timing(series, len(images)) for point, series in times.items()}


def take_turns(
    calls: Mapping[Key, Callable[[], object]], rounds: int, device: torch.device, watch: Watcher
) -> dict[Key, list[float]]:
    """Milliseconds of every call in every round."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            times[key].append((time.perf_counter() - began) * 1000)
            watch.step(1)
    return times


def timing(series: list[float], batch_size: int) -> Timing:
    """The Timing of measured latencies in milliseconds."""
    median = statistics.median(series)
    p95 = sorted(series)[max(0, -(-len(series) * 95 // 100) - 1)]  # nearest rank
    return Timing(median, p95, batch_size / median * 1000)


@torch.inference_mode()
def largest_difference(one: Predictor, other: Predictor, spec: Spec) -> float:
    """The largest absolute difference between the logits of two models on the same two random images."""
    probe = random_images(spec, 2)
    return (one(probe) - other(probe)).abs().max().item()


def bench(
    net: SlimmableViT,
    record: Record,
    points: Sequence[Point],
    settings: BenchSettings,
    where: DeviceSettings,
    watch: Watcher,
) -> dict[str, Any]:
    """What every point costs on this machine, as plain timm models of that width.

    Returns:
        {"device", "threads", "precision", "batch_size", "runs", "points"}; per point {"ratio", "params",
        "gmacs", "latency_ms", "latency_ms_p95", "throughput", "top1"}, top1 as the checkpoint records it.
    """
    device = choose_device(where)
    net.to(device)
    size, runs = settings.batch_size or 1, settings.runs or RUNS
    images = random_images(net.spec, size).to(device)
    models = {point: net.slice(point).to(device) for point in points}
    with autocast(device, where) if where.amp else nullcontext():
        timings = time_models(models, images, runs, watch)
    rows = []
    for point in points:
        costs, timed = cost(net.spec.at(point)), timings[point]
        rows.append(
            {
                "ratio": float(point.ratio),
                "params": costs["params"],
                "gmacs": costs["gmacs"],
                "latency_ms": round(timed.latency_ms, 3),
                "latency_ms_p95": round(timed.latency_ms_p95, 3),
                "throughput": round(timed.throughput, 2),
                "top1": record.top1(point),
            }
        )
    return {**conditions(device, bool(where.amp)), "batch_size": size, "runs": runs, "points": rows}


def conditions(device: torch.device, bfloat16: bool) -> dict[str, Any]:
    """What a measured time depends on, to be told with it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if bfloat16 else "float32",
    }
