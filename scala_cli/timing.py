"""Times calls on this machine, in milliseconds."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor

from scala_cli.device import device_name, synchronize
from scala_cli.watch import Watcher

WINDOW, WINDOWS = 3, 10
"""Rounds in a window of the warm-up, and the largest number of windows."""
STABLE = 0.97
"""The warm-up ends when no median falls below this share of the previous window's."""
ROUNDS = (10, 20, 40, 80, 160)
"""Rounds after which the medians are checked for SURE, if the user sets no number of rounds."""
SURE = 0.02
"""Half the confidence interval of a median, as a share of the median, at which timing stops."""
SECONDS = 20.0
"""Time limit of one measurement, in seconds."""

Key = TypeVar("Key")

Predictor = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> the model's output, such as logits (B, classes)"""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, its 95 % confidence interval, the 95th percentile.

    Fewer than six measurements have no interval.
    """

    median: float
    low: float | None
    high: float | None
    p95: float

    @classmethod
    def of(cls, series: Sequence[float]) -> "Timing":
        """Returns the Timing of measured milliseconds; the interval is from order statistics."""
        ordered, count = sorted(series), len(series)
        median, p95 = statistics.median(ordered), ordered[max(0, -(-count * 95 // 100) - 1)]  # nearest rank
        if count < 6:
            return cls(median, None, None, p95)
        reach = 1.96 * math.sqrt(count) / 2
        low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
        return cls(median, ordered[low], ordered[high], p95)

    @property
    def is_sure(self) -> bool:
        return (
            self.low is not None and self.high is not None and self.high - self.low <= 2 * SURE * self.median
        )


@torch.inference_mode()
def time_calls(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int | None,
    watch: Watcher,
    untimed: int = 0,
) -> dict[Key, Timing]:
    """Times calls in turns, so that a hot or shared machine slows all of them alike.

    Without `rounds` it stops once every median is known to about 2 % (95 % confidence), after at least 10
    rounds and at most 160 rounds or 20 seconds.

    Args:
        calls: already warmed up.
        rounds: how often each is timed.
        untimed: see `take_turns`.
    """
    series: dict[Key, list[float]] = {key: [] for key in calls}
    watch.phase("time", (rounds or ROUNDS[-1]) * len(calls), "runs")
    began = time.perf_counter()
    for number in range(1, (rounds or ROUNDS[-1]) + 1):
        for key, once in take_turns(calls, 1, device, watch, untimed).items():
            series[key] += once
        if rounds or number < ROUNDS[0]:
            continue
        late = time.perf_counter() - began > SECONDS
        if late or (number in ROUNDS and all(Timing.of(each).is_sure for each in series.values())):
            break
    return {key: Timing.of(each) for key, each in series.items()}


@torch.inference_mode()
def warm_up(calls: Mapping[Key, Callable[[], object]], device: torch.device, watch: Watcher) -> None:
    """Runs calls in turns until none of them gets faster."""
    watch.phase("warm up", WINDOWS * WINDOW * len(calls), "runs")
    medians = dict.fromkeys(calls, math.inf)
    for _ in range(WINDOWS):
        before = medians
        times = take_turns(calls, WINDOW, device, watch)
        medians = {key: statistics.median(series) for key, series in times.items()}
        if all(medians[key] >= STABLE * before[key] for key in calls):
            break


def take_turns(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    device: torch.device,
    watch: Watcher,
    untimed: int = 0,
) -> dict[Key, list[float]]:
    """Returns the milliseconds of every call in every round.

    Args:
        untimed: number of calls before each timed one. Other models have pushed its weights out of the
            cache, which makes a small one 10 to 20 % slower than it is alone.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            for _ in range(untimed):
                call()
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            times[key].append((time.perf_counter() - began) * 1000)
            watch.step(1)
    return times


def peak_gflops(device: torch.device, bfloat16: bool) -> float:
    """Returns the highest rate of large matrix products within one second, in GFLOP/s."""
    size = 2048 if device.type == "cpu" else 8192
    one, other = (
        torch.randn(size, size, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        for _ in range(2)
    )
    times, began = [math.inf], time.perf_counter()
    while time.perf_counter() - began < 1:
        synchronize(device)
        start = time.perf_counter()
        one @ other
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def conditions(device: torch.device, bfloat16: bool) -> dict[str, Any]:
    """Returns the conditions that a measured time depends on, to report with it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if bfloat16 else "float32",
        "torch": str(torch.__version__),
        "timm": timm.__version__,
    }
