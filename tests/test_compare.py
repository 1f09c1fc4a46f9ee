"""Methods side by side."""

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from conftest import write_timm_directory
from runs import Listener, settings, start

from scala_cli.errors import ScalaError, TrainingError
from scala_cli.measure import cost
from scala_cli.models.checkpoint import Record
from scala_cli.plot import draw_arms
from scala_cli.training.compare import ARMS, arms_of, columns, compare, training_gmacs
from scala_cli.training.gradients import GradientLog


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def open_start():
    net = start(ratios="0.5,1")
    return net, Record(trained=True, provenance={"weights": "test"})


def run(arms, data, watch=None, folder="side", seeds=2, equal="images", **changes):
    return compare(
        open_start, arms, seeds, equal, settings(data, 1, **changes), Path(folder), watch or Listener()
    )


def test_every_arm_is_trained_with_every_seed(photos):
    arms = arms_of(["scala", "paper", "separate"], [])
    rows = run(arms, photos)
    assert [row["arm"] for row in rows] == ["scala", "paper", "separate"]
    assert json.loads(Path("side/compare.json").read_text())["arms"] == rows
    assert Path("side/compare.csv").read_text().startswith("arm,0.5,1,")
    for row in rows:
        assert [point["ratio"] for point in row["points"]] == [0.5, 1]
        for point in row["points"]:
            assert len(point["seeds"]) == 2
            assert point["top1"] == pytest.approx(fmean(point["seeds"]), abs=0.01)
            assert point["spread"] == pytest.approx(stdev(point["seeds"]), abs=0.01)
    scala, paper = (
        json.loads(Path(f"side/{arm}/1/last/config.json").read_text()) for arm in ("scala", "paper")
    )
    assert scala["scala"]["layout"] == "aligned" and paper["scala"]["layout"] == "fused"
    assert scala["scala"]["order"] == "importance" and paper["scala"]["order"] in (None, "none")
    assert Path("side/separate/0/0.5/last/config.json").is_file()


def test_what_is_finished_is_not_trained_again_and_what_was_cut_goes_on(photos):
    arms = arms_of(["scala", "separate"], [])
    whole = run(arms, photos, folder="whole")
    with pytest.raises(KeyboardInterrupt):
        run(arms, photos, Listener(stop_at=11), folder="cut")
    again = Listener()
    cut = run(arms, photos, again, folder="cut")
    for one, other in zip(whole, cut, strict=True):
        assert one["points"] == other["points"]
    assert len(again.losses) == 18 - 9  # 6 runs of 3 steps, of which 3 were whole
    third = Listener()
    assert run(arms, photos, third, folder="cut") == cut
    assert not third.losses


def test_another_comparison_is_not_mixed_in(photos):
    run(arms_of(["scala"], []), photos, seeds=1)
    with pytest.raises(TrainingError, match="another comparison"):
        run(arms_of(["usnet"], []), photos, seeds=1)
    Path("full").mkdir()
    Path("full/notes").write_text("mine")
    with pytest.raises(ScalaError, match="full"):
        run(arms_of(["scala"], []), photos, folder="full")


def test_each_part_can_be_left_out():
    arms = arms_of(["scala"], ["order", "noise_calibration"])
    assert [arm.name for arm in arms] == ["scala", "scala-no-order", "scala-no-noise-calibration"]
    assert arms[1].method.order == "none" and not arms[2].method.noise_calibration
    for bad in (["scalar"], []):
        with pytest.raises(TrainingError, match="method"):
            arms_of(bad, [])
    with pytest.raises(TrainingError, match="no part 'colour'"):
        arms_of(["scala"], ["colour"])


def test_training_macs_are_those_by_hand(photos):
    net, chosen = open_start()[0], settings(photos)
    half, full = (cost(net.spec.at(point))["gmacs"] for point in net.points)
    assert training_gmacs(net, ARMS["scala"], chosen) == pytest.approx(3 * (half + full) + full, abs=1e-4)
    assert training_gmacs(net, ARMS["separate"], chosen) == pytest.approx(
        3 * (half + full) + 2 * full, abs=1e-4
    )
    assert training_gmacs(net, ARMS["usnet"], chosen) == pytest.approx(3 * (half + full), abs=1e-4)


def test_at_equal_macs_the_dearer_arm_sees_fewer_images(photos):
    scala, separate = run(arms_of(["scala", "separate"], []), photos, seeds=1, equal="macs")
    assert separate["epochs"] < scala["epochs"] == 1
    for row in (scala, separate):
        assert row["epochs"] * row["gmacs_per_image"] == pytest.approx(scala["gmacs_per_image"], rel=1e-3)


def test_a_picture_of_the_arms():
    point = {"ratio": 0.5, "top1": 50.0, "spread": None, "seeds": [50.0]}
    row = {"arm": "scala", "points": [point], "gmacs_per_image": 1.0, "minutes": 2.0}
    draw_arms([row], {0.5: 0.1}, Path("one.svg"))
    assert "<svg" in Path("one.svg").read_text()
    assert columns(row) == {"arm": "scala", "0.5": "50.00", "gmacs_per_image": 1.0, "minutes": 2.0}


def test_gradients_of_the_passes_are_told_apart():
    torch.manual_seed(0)
    weight, unused = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))
    passes = {"1": lambda: weight.pow(2).sum(), "0.5": lambda: weight[:1].sin().sum()}
    log = GradientLog([weight, unused], Path("grads.jsonl"))
    for _ in range(2):
        for name, loss in passes.items():
            loss().backward()
            log.add(name)
        log.write(7)
        weight.grad = None
    lines = [json.loads(line) for line in Path("grads.jsonl").read_text().splitlines()]
    alone = {name: torch.autograd.grad(loss(), weight)[0] for name, loss in passes.items()}
    for line in lines:
        assert line["step"] == 7
        assert line["norm"] == pytest.approx(
            {n: gradient.norm().item() for n, gradient in alone.items()},
            rel=1e-4,  # a difference of sums
        )
        cosine = torch.cosine_similarity(alone["1"], alone["0.5"], dim=0).item()
        assert line["cosine"]["1,0.5"] == pytest.approx(cosine, rel=1e-4)


def test_the_command(scala, photos):
    write_timm_directory(Path("model"), num_classes=3)
    quick = ("--epochs", 0.7, "-b", 4, "-j", 0, "--no-amp", "--device", "cpu", "--ratios", "0.5,1")
    call = (
        "compare",
        "model",
        "--data",
        photos,
        "--methods",
        "scala",
        "--without",
        "order",
        "--seeds",
        1,
        *quick,
    )
    done = scala(*call, "-o", "side", "--log-grads", "--holdout", 0.25, "--json")
    assert [row["arm"] for row in done.json["arms"]] == ["scala", "scala-no-order"]
    assert Path("side/compare.svg").is_file()
    line = json.loads(Path("side/scala/0/grads.jsonl").read_text().splitlines()[0])
    assert set(line["norm"]) == {"0.5", "1"} and set(line["cosine"]) == {"1,0.5"}
