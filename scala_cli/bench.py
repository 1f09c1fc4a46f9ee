"""What every width costs on this machine, beside other runtimes and other models, in one run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor, nn

from scala_cli.data.loader import Loader
from scala_cli.deploy.formats import format_named, write
from scala_cli.device import autocast, choose_device, peak_memory
from scala_cli.errors import ScalaError
from scala_cli.evaluate import accuracies, widths
from scala_cli.measure import Predictor, Timing, conditions, cost_of, peak_gflops, take_turns, time_calls
from scala_cli.models.checkpoint import Record
from scala_cli.models.locate import short_name
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import locate
from scala_cli.settings import BenchSettings, DeviceSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher

LARGEST_BATCH, SLOWEST_MS = 64, 3000
"""Where the search for the best batch ends."""


@dataclass(frozen=True)
class Subject:
    """One thing to be timed: a model in a runtime.

    Args:
        model: timm's name.
        point: the width; None for a model that is only compared with.
        build: the model, as it is trained ("cpu"), to be exported ("file"), or its skeleton ("meta").
        load: as it is run.
    """

    model: str
    point: Point | None
    runtime: str
    input_size: tuple[int, ...]
    build: Callable[[str], nn.Module]
    load: Callable[[], Predictor]


def bench(
    net: SlimmableViT,
    record: Record,
    points: Sequence[Point],
    compared: Sequence[str],
    settings: BenchSettings,
    where: DeviceSettings,
    watch: Watcher,
    loader: Loader | None = None,
) -> dict[str, Any]:
    """What every point costs on this machine, as plain timm models of that width.

    Args:
        compared: timm models to be timed beside them, with random weights: names, or directories.
        loader: images to measure accuracy on.

    Returns:
        {"device", "threads", "precision", "batch_size", "peak_gflops", "points"}; per point and runtime
        {"model", "ratio", "runtime", "params", "gmacs", "latency_ms", "latency_ms_ci95", "latency_ms_p95",
        "roofline", "throughput", "batch", "memory_mb", "top1"}: half the width of the median's 95 %
        confidence interval; the share of the peak that the latency stands for; images/s at the batch that
        gives most; by how much memory peaks while the model is loaded and answers once; top1 as measured,
        or as the checkpoint records it. Compared models come after the points, their ratio None.

    Raises:
        ScalaError: an unknown model or runtime, or one that is not installed or not for this device.
    """
    device = choose_device(where)
    runtimes = [name.strip() for name in settings.runtime.split(",") if name.strip()]
    runtimes += ["onnx-int8"] if settings.int8 else []
    refuse_runtimes(runtimes, device, bool(where.amp))
    size = settings.batch_size or 1
    with TemporaryDirectory() as folder, autocast(device, where) if where.amp else nullcontext():
        subjects = list(subjects_of(net, points, compared, runtimes, device, Path(folder), watch))
        images = {each.input_size: torch.randn(size, *each.input_size).to(device) for each in subjects}
        watch.phase("load", len(subjects), "models")
        models: dict[Subject, Predictor] = {}
        peaks: dict[Subject, int | None] = {}
        for first in {each.runtime: each for each in reversed(subjects)}.values():
            load_and_answer(first, images[first.input_size], device)  # what only the first of a runtime costs
        for each in subjects:
            models[each], peaks[each] = load_and_answer(each, images[each.input_size], device)
            watch.step(1)
        peak = peak_gflops(device, bool(where.amp))
        calls = {each: partial(model, images[each.input_size]) for each, model in models.items()}
        timings = time_calls(calls, device, settings.runs, watch)
        most = {
            each: (size, size / timings[each].median * 1000)
            if settings.batch_size
            else best_batch(model, each, device, watch)
            for each, model in models.items()
        }
        known = top1_of(net, record, points, models, where, loader, watch)
    rows = [row_of(each, timings[each], size, most[each], peaks[each], peak) for each in subjects]
    for each, row in zip(subjects, rows, strict=True):
        row["top1"] = known.get((each.point, is_int8(each)))
    told = conditions(device, bool(where.amp))
    return {**told, "batch_size": size, "peak_gflops": round(peak, 1), "points": rows}


def top1_of(
    net: SlimmableViT,
    record: Record,
    points: Sequence[Point],
    models: Mapping[Subject, Predictor],
    where: DeviceSettings,
    loader: Loader | None,
    watch: Watcher,
) -> dict[tuple[Point | None, bool], float | None]:
    """Top-1 of every point, and of those with 8-bit weights, of which no record tells."""
    if loader is None:
        return {(point, False): record.top1(point) for point in points}
    device = choose_device(where)
    predictors = {(point, False): run for point, run in widths(net.to(device), points, where).items()}
    rounded = {(each.point, True): run for each, run in models.items() if each.point and is_int8(each)}
    found = accuracies({**predictors, **rounded}, loader, device, watch)
    return {key: accuracy["top1"] for key, accuracy in found.items()}


def is_int8(subject: Subject) -> bool:
    return subject.runtime.endswith("int8")


def refuse_runtimes(runtimes: Sequence[str], device: torch.device, bfloat16: bool) -> None:
    """Raises ScalaError for a runtime that does not exist here, or does not run as asked."""
    for name in runtimes:
        if name in ("torch", "compile"):
            continue
        format_named(name)
        if device.type != "cpu" or bfloat16:
            raise ScalaError(
                f"{name} is timed on the CPU in its own precision.", "Leave out --amp, or give --device cpu."
            )


def subjects_of(
    net: SlimmableViT,
    points: Sequence[Point],
    compared: Sequence[str],
    runtimes: Sequence[str],
    device: torch.device,
    folder: Path,
    watch: Watcher,
) -> Iterator[Subject]:
    """Every point, then every compared model, in every runtime; files are written to `folder`."""

    def width(point: Point, place: str) -> nn.Module:
        return net.spec.at(point).build() if place == "meta" else net.slice(point, fixed_size=place == "file")

    def other(name: str, args: Mapping[str, Any], place: str) -> Any:
        with torch.device("meta" if place == "meta" else "cpu"):
            return timm.create_model(name, **args).eval()

    models: list[tuple[str, Point | None, tuple[int, ...], Callable[[str], nn.Module]]] = [
        (net.spec.architecture, point, net.spec.input_size, partial(width, point)) for point in points
    ]
    for asked in compared:
        named = partial(other, *locate(asked))
        models.append((short_name(asked), None, tuple(named("meta").pretrained_cfg["input_size"]), named))
    watch.phase("prepare", len(models) * len(runtimes), "models")
    for number, (name, point, input_size, build) in enumerate(models):
        for runtime in runtimes:
            load = loader(runtime, build, device, input_size, folder / str(number))
            yield Subject(name, point, runtime, input_size, build, load)
            watch.step(1)


def loader(
    runtime: str,
    build: Callable[[str], nn.Module],
    device: torch.device,
    input_size: tuple[int, ...],
    stem: Path,
) -> Callable[[], Predictor]:
    """How a model is loaded to be run; where that is from a file, it is written now."""
    if runtime == "torch":
        return lambda: build("cpu").to(device)
    if runtime == "compile":
        return lambda: torch.compile(build("cpu").to(device))
    chosen = format_named(runtime)
    file = stem.with_name(f"{stem.name}-{runtime}{chosen.suffix}")
    write(runtime, build("file"), torch.randn(2, *input_size), file)
    return partial(chosen.open, file)


@torch.inference_mode()
def load_and_answer(subject: Subject, images: Tensor, device: torch.device) -> tuple[Predictor, int | None]:
    """The model as it is run, and by how many bytes memory peaked, where that is not the compiler's."""
    kept: list[Predictor] = []

    def answer() -> None:
        kept.append(subject.load())
        kept[0](images)

    peak = peak_memory(device, answer)
    return kept[0], None if subject.runtime == "compile" else peak


@torch.inference_mode()
def best_batch(
    predict: Predictor, subject: Subject, device: torch.device, watch: Watcher
) -> tuple[int, float]:
    """The batch that gives the most images/s, and how many; sizes double until two in a row gain nothing."""
    best, size, idle = (1, 0.0), 1, 0
    watch.phase("find the best batch", LARGEST_BATCH.bit_length(), "sizes")
    while size <= LARGEST_BATCH and idle < 2:
        images = torch.randn(size, *subject.input_size).to(device)
        call = {0: partial(predict, images)}
        first = take_turns(call, 1, device, Watcher())[0][0]
        times = take_turns(call, 2, device, Watcher())[0]
        rate = size / min(times) * 1000
        idle = 0 if rate > 1.02 * best[1] else idle + 1
        best = max(best, (size, rate), key=lambda found: found[1])
        watch.step(1)
        if first > SLOWEST_MS:
            break
        size *= 2
    return best


def row_of(
    subject: Subject,
    timing: Timing,
    size: int,
    most: tuple[int, float],
    memory: int | None,
    peak: float,
) -> dict[str, Any]:
    """The row of one subject; its accuracy is filled in by who knows it."""
    costs = cost_of(subject.build("meta"), subject.input_size)
    reached = 2 * costs["gmacs"] * size / (timing.median / 1000) / peak
    return {
        "model": subject.model,
        "ratio": float(subject.point.ratio) if subject.point else None,
        "runtime": subject.runtime,
        **costs,
        "latency_ms": round(timing.median, 3),
        "latency_ms_ci95": round((timing.high - timing.low) / 2, 3),
        "latency_ms_p95": round(timing.p95, 3),
        "roofline": None if is_int8(subject) else round(reached, 3),
        "throughput": round(most[1], 2),
        "batch": most[0],
        "memory_mb": None if memory is None else round(memory / 1e6, 1),
        "top1": None,
    }
