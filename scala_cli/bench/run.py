"""Times models in turns, one runtime after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.bench.subject import TORCH, Subject, other, points_of, refuse_runtimes
from scala_cli.cost import gmacs
from scala_cli.data.loader import Loader
from scala_cli.device import allow_compiling_all, choose_device
from scala_cli.errors import naming_failure
from scala_cli.evaluate import answering, at_their_sizes, metrics, widths
from scala_cli.formats import FORMATS, is_int8, write
from scala_cli.memory import naming_lack_of_memory, peak_memory
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.precision import autocast, note_emulation
from scala_cli.settings import BenchSettings, DeviceSettings
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.tasks.base import Task, main_column
from scala_cli.timing import Predictor, Timing, conditions, peak_gflops, take_turns, time_calls, warm_up
from scala_cli.watch import QUIET, Watcher

LARGEST_BATCH, LARGEST_ON_A_GPU, SLOWEST_MS = 64, 1024, 3000
"""Limits of the search for the best batch: its size on a CPU and on a GPU, and milliseconds of one call."""


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
    """Measures what every point costs on this machine, as a plain timm model.

    All points and compared models take turns, so that a hot or shared machine slows all alike.
    Runtimes come one after the other: threads of one that still spin would slow the next.

    Args:
        compared: timm models to time as well, with random weights: names or directories.
        loader: images to measure accuracy on.

    Returns:
        {"device", "threads", "precision", "torch", "timm", "batch_size", "peak_gflops", "points"}. Each point
        and runtime has a row {"model", "ratio", "runtime", "params", "gmacs", "latency_ms", "latency_ms_low",
        "latency_ms_high", "latency_ms_p95", "of_peak", "throughput", "batch", "memory_mb", "top1"}:

        latency_ms: the median; low and high bound its 95 % confidence interval.
        of_peak: the rate of computing at this latency, as a share of peak_gflops.
        throughput: the most images/s, reached at "batch" images.
        memory_mb: how far peak memory rises while the model is loaded and run once.
        top1: (r2 for features) as measured on `loader`, else as recorded in the checkpoint.

        Compared models have no ratio.

    Raises:
        ScalaError: for an unknown model or runtime, or one not installed or not for this device.
    """
    where = replace(where, amp=bool(where.amp))
    device = choose_device(where)
    note_emulation(device, where, watch)
    runtimes = list(dict.fromkeys(name.strip() for name in settings.runtime.split(",") if name.strip()))
    runtimes += ["onnx-int8"] if settings.int8 else []
    refuse_runtimes(runtimes, device, bool(where.amp))
    subjects = [*points_of(net, points), *map(other, compared)]
    net.slice(
        net.widest
    )  # loads all weights now, so that the memory of a width does not depend on which came first
    task = task_named(record.task)
    main = main_column(task)
    run = Bench(
        device,
        where,
        settings.batch_size or 1,
        settings.runs,
        not settings.batch_size,
        peak_gflops(device, bool(where.amp)),
        watch,
        main,
    )
    exact: dict[Any, float | None] = {point: record.measured(point, main) for point in points}
    if loader:
        there = net if device.type == "cpu" else deepcopy(net).to(device)
        reference = None if task.labelled else answering(there.vit, task, where)
        models = widths(there, task, points, where)
        exact = {**measured(net, models, task, loader, device, watch, reference)}

    def accuracy(runtime: str, models: Mapping[Point, Predictor]) -> Mapping[Any, float | None]:
        if not is_int8(runtime):
            return exact
        if loader is None:
            return {}
        if not task.every_token:
            return measured(net, models, task, loader, device, watch)
        with TemporaryDirectory() as folder:  # the timed models return no patch tokens
            dense = {point: answering_in(runtime, net, point, task, Path(folder)) for point in points}
            reference = answering(net.at(Fraction(1)), task, where)
            return measured(net, dense, task, loader, device, watch, reference)

    rows = [row for runtime in runtimes for row in run.rows(subjects, runtime, partial(accuracy, runtime))]
    told = conditions(device, bool(where.amp))
    return {**told, "batch_size": run.size, "peak_gflops": round(run.peak, 1), "points": rows}


@dataclass(frozen=True)
class Bench:
    """Times subjects, all in the same way.

    Args:
        size: batch size of the latency.
        rounds: how often each is timed; None means until the medians are known.
        search: whether to look for the batch size with the most images/s.
        peak: GFLOP/s of large matrix products.
        main: the task's first metric.
    """

    device: torch.device
    where: DeviceSettings
    size: int
    rounds: int | None
    search: bool
    peak: float
    watch: Watcher
    main: str

    def rows(
        self,
        subjects: Sequence[Subject],
        runtime: str,
        accuracy: Callable[[Mapping[Point, Predictor]], Mapping[Any, float | None]],
    ) -> list[dict[str, Any]]:
        """Returns a row for each subject in one runtime; its models are unloaded at the end.

        Args:
            accuracy: returns the accuracy of each point, given the loaded models.
        """
        with TemporaryDirectory() as folder:
            loads = {each: self.loading(each, runtime, Path(folder)) for each in subjects}
            images = {each: torch.randn(self.size, *each.input_size).to(self.device) for each in subjects}
            self.load(
                loads[subjects[0]], images[subjects[0]], runtime
            )  # a runtime's first model also loads the runtime
            models: dict[Subject, Predictor] = {}
            peaks: dict[Subject, int | None] = {}
            self.watch.phase(f"load ({runtime})", len(subjects), "models")
            for each in subjects:
                models[each], peaks[each] = self.load(loads[each], images[each], runtime)
                self.watch.step(1)
            calls = {each: partial(model, images[each]) for each, model in models.items()}
            warm_up(calls, self.device, self.watch)
            timings = time_calls(calls, self.device, self.rounds, self.watch, untimed=1)
            most = {each: (self.size, timing) for each, timing in timings.items()}
            most |= self.most(models) if self.search else {}
            known = accuracy({each.point: model for each, model in models.items() if each.point})
            return [
                {
                    "model": each.name,
                    **(each.point.columns() if each.point else {"ratio": None}),
                    "runtime": runtime,
                    "params": each.params,
                    "gmacs": gmacs(each.macs),
                    **self.row_of(each, timings[each], runtime),
                    "throughput": round(most[each][0] / most[each][1].median * 1000, 2),
                    "batch": most[each][0],
                    "memory_mb": megabytes(peaks[each]),
                    self.main: known.get(each.point),
                }
                for each in subjects
            ]

    def row_of(self, subject: Subject, timing: Timing, runtime: str) -> dict[str, Any]:
        """Returns the columns of a latency."""
        reached = 2 * subject.macs / 1e9 * self.size / (timing.median / 1000) / self.peak
        return {
            "latency_ms": round(timing.median, 3),
            "latency_ms_low": round(timing.low, 3) if timing.low is not None else None,
            "latency_ms_high": round(timing.high, 3) if timing.high is not None else None,
            "latency_ms_p95": round(timing.p95, 3),
            "of_peak": None if is_int8(runtime) else round(reached, 3),
        }

    def loading(self, subject: Subject, runtime: str, folder: Path) -> Callable[[], Predictor]:
        """Returns a function that loads a subject; if it loads a file, the file is written now."""
        if runtime in TORCH:
            return partial(self.in_torch, subject, runtime == "compile")
        chosen = FORMATS[runtime]
        file = folder / f"{len(list(folder.iterdir()))}{chosen.suffix}"
        write(runtime, subject.build(True), torch.randn(2, *subject.input_size), file)
        return partial((self.where.amp and chosen.open_bfloat16) or chosen.open, file)

    def in_torch(self, subject: Subject, compiled: bool) -> Predictor:
        model: Any = subject.build(False).to(self.device)
        if compiled:
            allow_compiling_all()
            model = torch.compile(model)
        if not self.where.amp:
            return model

        def predict(images: Tensor) -> Tensor:
            with autocast(self.device, self.where):  # entered per batch, so weights are cast every time
                return model(images)

        return predict

    @torch.inference_mode()
    def load(
        self, load: Callable[[], Predictor], images: Tensor, runtime: str
    ) -> tuple[Predictor, int | None]:
        """Loads a model and runs it once. Returns it and the rise of peak memory in bytes.

        Raises ScalaError if the runtime cannot run it.
        """
        kept: list[Predictor] = []

        def answer() -> None:
            kept.append(load())
            kept[0](images)

        what = f"{runtime} cannot run this model on {len(images)} images"
        named = nullcontext() if runtime == "torch" else naming_failure(what, remedy="other_runtime")
        with named, naming_lack_of_memory(len(images)):
            peak = peak_memory(self.device, answer)
        return kept[0], None if runtime == "compile" else peak

    def most(self, models: Mapping[Subject, Predictor]) -> dict[Subject, tuple[int, Timing]]:
        """Returns each model's batch size with the most images/s, and its time, measured in turns.

        Left out are models for which it is the size of the latency, which is timed already.
        """
        self.watch.phase("find the best batch", len(models), "models")
        best = {}
        for each, model in models.items():
            best[each] = self.best_batch(model, each)
            self.watch.step(1)
        calls = {
            each: partial(models[each], torch.randn(size, *each.input_size).to(self.device))
            for each, size in best.items()
            if size != self.size
        }
        timings = time_calls(calls, self.device, 5, self.watch)
        return {each: (best[each], timing) for each, timing in timings.items()}

    @torch.inference_mode()
    def best_batch(self, predict: Predictor, subject: Subject) -> int:
        """Returns the batch size with the most images/s.

        Sizes double until two in a row gain nothing, or one takes too long or too much memory.
        """
        best, rate, size, idle = 1, 0.0, 1, 0
        largest = LARGEST_BATCH if self.device.type == "cpu" else LARGEST_ON_A_GPU
        while size <= largest and idle < 2:
            try:
                images = torch.randn(size, *subject.input_size).to(self.device)
                once = take_turns({0: partial(predict, images)}, 3, self.device, QUIET)[0]
            except (MemoryError, RuntimeError):
                break
            found = size / min(once) * 1000
            idle = 0 if found > 1.02 * rate else idle + 1
            best, rate = max((best, rate), (size, found), key=lambda each: each[1])
            if min(once) > SLOWEST_MS:
                break
            size *= 2
        return best


class Answering(nn.Module):
    """A model with the output that its task needs."""

    def __init__(self, vit: VisionTransformer, task: Task) -> None:
        super().__init__()
        self.vit, self.task = vit, task

    def forward(self, images: Tensor) -> Tensor:
        return self.task.forward(self.vit, images)


def answering_in(runtime: str, net: SlimmableViT, point: Point, task: Task, folder: Path) -> Predictor:
    """Returns a width in another runtime, with the output that the task needs."""
    file = folder / f"{point.file_name}{FORMATS[runtime].suffix}"
    model = Answering(net.slice(point, fixed_size=True), task).eval()
    write(runtime, model, torch.randn(2, *net.spec_at(point).input_size), file)
    opened = FORMATS[runtime].open(file)
    return lambda images: opened(net.fitting(images, point))


def measured(
    net: SlimmableViT,
    models: Mapping[Point, Predictor],
    task: Task,
    loader: Loader,
    device: torch.device,
    watch: Watcher,
    reference: Predictor | None = None,
) -> dict[Point, float]:
    """Returns the task's first metric of every point; arguments are those of `metrics`.

    Images are decoded at each point's size, or for features once (see `evaluate_as_sliced`).
    """
    found: dict[Point, dict[str, Any]] = {}
    sizes = [([*models], loader)] if task.every_token else at_their_sizes(net, [*models], loader)
    for points, sized in sizes:
        some = {point: models[point] for point in points}
        found |= metrics(some, task, sized, device, watch, reference=reference)
    return {point: each[main_column(task)] for point, each in found.items()}


def megabytes(size: int | None) -> float | None:
    """Converts bytes to MB."""
    return None if size is None else round(size / 1e6, 1)
