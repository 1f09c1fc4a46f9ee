"""Benchmarks: what is timed, how long, and what is reported."""

import itertools
import re
import shutil
import statistics
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import write_timm_directory

from scala_cli import timing
from scala_cli.cost import pareto
from scala_cli.formats import FORMATS
from scala_cli.plot import as_svg, bench_picture
from scala_cli.slicing.point import Point, grid, parse_keeps
from scala_cli.tasks import task_named
from scala_cli.timing import Timing, peak_gflops, time_calls, warm_up
from scala_cli.watch import QUIET

CPU = torch.device("cpu")


def test_a_timing_tells_the_median_and_how_sure_it_is():
    series = [float(n) for n in range(1, 101)]
    Random(0).shuffle(series)
    found = Timing.of(series)
    assert found.median == 50.5 and found.p95 == 95
    assert found.low <= 41 and found.high >= 60  # binomial: ranks 40 to 61 of 100 hold the median with 95 %
    assert Timing.of([7.0] * 5) == Timing(7, None, None, 7)


def test_the_interval_holds_the_median_as_often_as_it_says():
    """Draws 4,000 samples of a skewed distribution with median log 2."""
    random, held = Random(0), 0
    for _ in range(4000):
        found = Timing.of([random.expovariate(1) for _ in range(30)])
        held += found.low <= 0.693147 <= found.high
    assert 0.94 <= held / 4000 <= 0.99


class Clock:
    """A clock that only calls of `spend` move on."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def spend(self, name, milliseconds):
        self.order.append(name)
        self.now += next(milliseconds) / 1000


def steadily(value, *first):
    yield from first
    while True:
        yield value


def test_calls_take_turns_until_all_are_sure(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {name: partial(clock.spend, name, steadily(ms)) for name, ms in (("a", 1.0), ("b", 5.0))}
    found = time_calls(calls, CPU, None, QUIET)
    assert clock.order == ["a", "b"] * (len(clock.order) // 2)
    assert {name: round(each.median, 6) for name, each in found.items()} == {"a": 1, "b": 5}
    assert len(clock.order) == 2 * timing.ROUNDS[0]


def test_a_call_that_others_made_slow_is_timed_once_it_is_fast_again(monkeypatch):
    clock = Clock(monkeypatch)
    after_others = {name: itertools.cycle([9.0, ms]) for name, ms in (("a", 1.0), ("b", 5.0))}
    calls = {name: partial(clock.spend, name, series) for name, series in after_others.items()}
    found = time_calls(calls, CPU, 3, QUIET, untimed=1)
    assert clock.order == ["a", "a", "b", "b"] * 3
    assert {name: round(each.median, 6) for name, each in found.items()} == {"a": 1, "b": 5}


def test_warming_up_lasts_until_nothing_gets_faster(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": partial(clock.spend, "a", steadily(1.0, *range(40, 28, -1)))}
    warm_up(calls, CPU, QUIET)
    assert 12 < len(clock.order) <= 12 + 2 * timing.WINDOW
    warm_up({"a": partial(clock.spend, "a", (1000 * 0.9**n for n in range(10**6)))}, CPU, QUIET)
    assert len(clock.order) <= 12 + 2 * timing.WINDOW + timing.WINDOW * timing.WINDOWS


def test_noise_is_measured_longer_but_not_for_ever(monkeypatch):
    clock, random = Clock(monkeypatch), Random(0)
    noisy = (random.choice([1.0, 2.0]) for _ in iter(int, 1))
    time_calls({"a": partial(clock.spend, "a", noisy)}, CPU, None, QUIET)
    assert len(clock.order) == timing.ROUNDS[-1]
    slow = Clock(monkeypatch)
    noisy = (random.choice([1000.0, 9000.0]) for _ in iter(int, 1))
    time_calls({"a": partial(slow.spend, "a", noisy)}, CPU, None, QUIET)
    assert len(slow.order) == timing.ROUNDS[0]


def test_the_peak_is_at_least_what_a_naive_clock_sees():
    import time

    one = torch.randn(2048, 2048)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        one @ one
        times.append(time.perf_counter() - began)
    assert peak_gflops(CPU, False) > 0.5 * 2 * 2048**3 / statistics.median(times) / 1e9


def test_the_front_holds_what_nothing_beats():
    random = Random(0)
    places = [(random.randint(1, 20), random.randint(1, 20)) for _ in range(60)]
    beaten = {
        place
        for place in places
        for other in places
        if other != place and other[0] <= place[0] and other[1] >= place[1]
    }
    assert [places[number] for number in pareto(places)] == sorted(set(places) - beaten)


class Page(HTMLParser):
    """Counts a page's elements, and lists what it would fetch."""

    def __init__(self):
        super().__init__()
        self.count, self.fetched = {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v and v[0] != "#"
        ]


def test_runtimes_and_other_models_in_one_run(scala, tiny, photos):
    words = ("bench", tiny, "--ratio", "0.5", "--ratio", "1", "--runtime", "torch,onnx", "--int8")
    words += ("--compare", "tiny-timm", "--data", photos, "-j", 0, "--runs", 3, "-b", 2)
    told = scala(*words, "--csv", "b.csv", "--html", "b.html", "--plot", "b.png", "--json").json
    rows = told["points"]
    assert [(row["ratio"], row["runtime"]) for row in rows] == [
        (ratio, runtime) for runtime in ("torch", "onnx", "onnx-int8") for ratio in (0.5, 1, None)
    ]
    assert all(row["model"] == "tiny-timm" for row in rows[2::3])
    assert all((row["top1"] is None) == (row["ratio"] is None) for row in rows)
    for row in rows:
        assert 0 < row["latency_ms"] <= row["latency_ms_p95"] and row["batch"] == 2
        if row["runtime"] == "onnx-int8":
            assert row["of_peak"] is None
        else:
            reached = 2 * row["gmacs"] * 2 / row["latency_ms"] * 1000 / told["peak_gflops"]
            assert row["of_peak"] == pytest.approx(reached, rel=0.05, abs=1e-3)
    page = Page()
    page.feed(Path("b.html").read_text())
    assert page.count["tr"] == 10 and page.count["svg"] == 1 and page.count["table"] == 1
    assert not page.fetched, "the page must stand alone"
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path("b.csv").read_text().splitlines()) == 10


def test_a_picture_of_a_grid_has_the_fronts_of_its_axes_and_a_tooltip_for_every_point():
    points = grid([Point.of(ratio) for ratio in ("0.5", "1")], (16, 32), parse_keeps("0.5,1"))
    rows = [
        {
            "model": "vit",
            **point.columns(),
            "runtime": "torch",
            "gmacs": 1.0,
            "latency_ms": 2.0 + n,
            "top1": n,
        }
        for n, point in enumerate(points)
    ]
    svg = as_svg(bench_picture(rows, task_named("classification")))
    tooltips = re.findall('<g id="point-[0-9]+"><title>(.*?)</title>', svg)
    assert tooltips == [f"{point}, torch: {2 + n} ms, {n} (top-1, %)" for n, point in enumerate(points)]
    for axis in ("width", "size", "tokens"):
        assert f"front of {axis} alone" in svg
    widths = bench_picture(
        [row for row in rows if row["size"] == 32 and "keep" not in row], task_named("classification")
    )
    assert "alone" not in as_svg(widths)


def test_what_8_bit_weights_keep_of_features(scala, pictures, monkeypatch):
    """All tokens are compared; the timed file gives the model's own output only."""
    write_timm_directory(Path("backbone"), num_classes=0, depth=1)
    timed, opened = [], FORMATS["onnx-int8"].open

    def opening(file):
        run = opened(file)
        timed.append(run(torch.randn(2, 3, 16, 16)).shape)
        return run

    monkeypatch.setitem(FORMATS, "onnx-int8", replace(FORMATS["onnx-int8"], open=opening))
    scala("convert", "backbone", "--data", pictures, "--ratios", "0.5,1", "-o", "net", "-j", 0)
    words = ("bench", "net", "--int8", "--runs", 1, "-b", 2, "-j", 0, "--json")
    rows = scala(*words, "--data", pictures).json["points"]
    exact, rounded = ({row["ratio"]: row["r2"] for row in some} for some in (rows[:2], rows[2:]))
    assert {(2, 32), (2, 17, 32)} == {*timed}
    assert exact[1] == 1 > rounded[1] > 0.9 and rounded[0.5] == pytest.approx(exact[0.5], abs=0.05)
    assert rounded[0.5] != exact[0.5]
    assert scala(*words, "--ratio", 0.5).json["points"][1]["r2"] is None  # no images


def test_another_model_by_its_name(scala, tiny):
    words = ("bench", tiny, "--ratio", "0.5", "--compare", "test_vit", "--runs", 1, "-b", 1)
    ours, other = scala(*words, "--json").json["points"]
    assert other["model"] == "test_vit" and other["params"] > ours["params"]


def test_the_best_batch_is_searched_for(scala, tiny):
    (row,) = scala("bench", tiny, "--ratio", "0.5", "--json").json["points"]
    assert row["batch"] > 1 and row["throughput"] > 1000 / row["latency_ms"]


@pytest.mark.parametrize("every, new_head", [(1, False), (4, False), (1, True)])
def test_what_training_cost_is_told_beside(scala, tiny, folder, every, new_head):
    if new_head:
        for part in ("train", "val"):
            shutil.rmtree(folder / part / "blue")
    words = ("--epochs", 3, "-b", 4, "-j", 0, "--no-amp", "--full-every", every)
    scala("finetune", tiny, "--data", folder, "-o", "run", *words)
    answer = scala("bench", "run", "--ratio", "0.5", "--runs", 1, "--json")
    spent = answer.json["training"]
    gmacs = [row["gmacs"] for row in scala("info", "run", "--json").json["points"]]
    *narrow, full = gmacs
    alone = full if new_head else 0  # for a third as many epochs, without a teacher
    joint, apart = 3 * (sum(narrow) + full / every) + full + alone, 3 * sum(gmacs) + 4 * full
    close = 0.02 if every > 1 else 1e-3  # the steps of a full width are drawn
    assert spent["separate"] == pytest.approx(apart / joint, rel=close) and spent["minutes"] > 0
    assert "all widths at once" in answer.stderr
    assert "training" not in scala("bench", tiny, "--ratio", "0.5", "--runs", 1, "--json").json


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtime", "magic"], "there is no runtime 'magic'"),
        (["--runtime", "onnx", "--amp"], "onnx does not compute in bfloat16"),
        (["--compare", "nosuchmodel"], "there is no model 'nosuchmodel'"),
        (["--plot", "x.txt"], "not a picture file"),
        (["--plot", "nowhere/x.svg"], "there is no directory nowhere"),
        (["--plot", "tiny/picture.svg"], "picture.svg is a directory"),
        (["--csv", "tiny"], "tiny is a directory"),
        (["--html", "nowhere/x.html"], "there is no directory nowhere"),
        (["--train", "--int8"], "--train times torch on random images"),
        (["--train", "--compare", "deit_s"], "--train times torch on random images"),
    ],
)
def test_mistakes_in_measuring(scala, tiny, words, message):
    Path("tiny/picture.svg").mkdir()
    answer = scala("bench", tiny, *words)
    assert answer.code == 2 and answer.stdout == ""
    assert message in answer.told
