"""Comparing methods with `scala compare`."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from conftest import slimmable, write_timm_directory
from runs import Listener, accuracies, settings, start

from scala_cli.errors import TrainingError
from scala_cli.models.checkpoint import Record
from scala_cli.plot import arms_picture, save
from scala_cli.settings import AugmentSettings, OptimizerSettings, ReadSettings
from scala_cli.slicing.point import parse_points
from scala_cli.tasks import task_named
from scala_cli.training.compare import arms_of, columns, compare, recipes, summary
from scala_cli.training.gradients import GradientLog
from scala_cli.training.price import Macs, training_macs

pytestmark = pytest.mark.usefixtures("elsewhere")


def open_start():
    net = start(ratios="0.5,1")
    return net, Record(trained=True, provenance={"weights": "test"})


def costs() -> Macs:
    return Macs.of(open_start()[0])


def price(name: str, macs: Macs) -> float:
    return training_macs(macs, recipes()[name].settings, "classification", pretrained=True)


def run(arms, data, watch=None, folder="side", seeds=2, equal="images", **changes):
    return compare(
        "model",
        open_start,
        arms,
        seeds,
        equal,
        settings(data, 1, **changes),
        Path(folder),
        watch or Listener(),
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
    assert len(again.losses) == 18 - 9  # 6 runs of 3 steps, 3 of them finished
    third = Listener()
    assert run(arms, photos, third, folder="cut") == cut
    assert not third.losses


def test_another_comparison_is_not_mixed_in(photos):
    run(arms_of(["scala"], []), photos, seeds=1)
    with pytest.raises(TrainingError, match="another comparison"):
        run(arms_of(["usnet"], []), photos, seeds=1)
    with pytest.raises(TrainingError, match="another comparison"):
        compare(
            "other",
            open_start,
            arms_of(["scala"], []),
            1,
            "images",
            settings(photos, 1),
            Path("side"),
            Listener(),
        )
    Path("full").mkdir()
    Path("full/notes").write_text("mine")
    for held in ("mine", "{}", "[]"):
        Path("full/compare.json").write_text(held)
        with pytest.raises(TrainingError, match="do not belong to a comparison"):
            run(arms_of(["scala"], []), photos, folder="full")


def test_each_part_can_be_left_out():
    arms = arms_of(["scala"], ["order", "noise_calibration", "order"])
    assert [arm.name for arm in arms] == ["scala", "scala-no-order", "scala-no-noise-calibration"]
    assert arms[1].method.order == "none" and not arms[2].method.noise_calibration
    assert arms[1].method.isolation is False  # as with the order: only one part differs
    for bad in (["scalar"], []):
        with pytest.raises(TrainingError, match="method"):
            arms_of(bad, [])
    with pytest.raises(TrainingError, match="no part 'colour'"):
        arms_of(["scala"], ["colour"])


def test_training_macs_are_those_by_hand():
    macs = costs()
    half, full = macs.points.values()
    assert full == macs.full and half > 0
    assert price("scala", macs) == 3 * (half + full) + full
    assert price("separate", macs) == 3 * (half + full) + 2 * full
    assert price("usnet", macs) == 3 * (half + full)


def test_the_teacher_costs_the_full_width_also_where_that_is_not_trained():
    macs = Macs.of(start(ratios="0.25,0.5"))
    quarter, half = macs.points.values()
    assert macs.full > 3 * half
    assert price("scala", macs) == 3 * (quarter + half) + macs.full
    assert price("separate", macs) == 3 * (quarter + half) + 2 * macs.full


def test_costs_are_means_over_what_steps_draw():
    points = parse_points("0.25,0.375,0.5,0.625,0.75,0.875,1")
    macs = Macs({point: number for number, point in enumerate(points)}, 0)
    middle = 2 + 4.5  # 1, 2 or 3 from the lower half, 4 or 5 from the upper, equally often
    assert price("scala", macs) == pytest.approx(3 * (0 + middle + 6), rel=0.01)


def test_at_equal_macs_the_dearer_arm_sees_fewer_images(photos):
    """scala takes nine steps a run; `separate` divides the same MACs among its two widths and teachers."""
    listener = Listener()
    arms = arms_of(["scala", "separate"], [])
    compare("model", open_start, arms, 1, "macs", settings(photos, 3), Path("side"), listener)
    alone = [losses for losses in listener.losses if len(losses) == 1]
    assert len(listener.losses) - len(alone) == 9
    scala, separate = price("scala", costs()), price("separate", costs())
    assert len(alone) == 2 * round(9 * scala / separate) < 18


def test_a_shorter_arm_warms_up_for_as_large_a_part():
    chosen = OptimizerSettings(epochs=10, warmup_epochs=5).for_share(1 / 4)
    assert (chosen.epochs, chosen.warmup_epochs) == (2.5, 1.25)
    assert OptimizerSettings(epochs=10).for_share(1 / 4).warmup_epochs is None


def test_other_readers_make_no_other_comparison(photos):
    arms, listener = arms_of(["scala"], []), Listener()
    run(arms, photos, seeds=1)
    run(arms, photos, listener, seeds=1, read=ReadSettings(workers=1))
    assert not listener.losses
    with pytest.raises(TrainingError, match="another comparison"):
        run(arms, photos, seeds=1, augment=AugmentSettings(hflip=0))


def test_minutes_are_those_of_every_epoch_and_width():
    points = parse_points("0.5,1")
    done = [{"minutes": 2.0, "points": [{"ratio": 0.5, "top1": 1.0}]}, {"minutes": 1.0, "points": []}]
    rows = [*done, {"minutes": 4.0, "points": [{"ratio": 1, "top1": 3.0}]}]
    told = summary([rows, rows], dict.fromkeys(points, 1), "top1")
    assert told["minutes"] == 7
    assert [point["top1"] for point in told["points"]] == [1, 3]


def test_a_start_that_favours_an_arm_is_refused(photos):
    def started(**record):
        return lambda: (open_start()[0], replace(open_start()[1], **record))

    arms = arms_of(["scala"], [])
    for changed in ({"order": "importance"}, {"metrics": accuracies(0.5, 1.0)}):
        with pytest.raises(TrainingError, match="in order already"):
            compare("m", started(**changed), arms, 1, "images", settings(photos), Path("a"), Listener())
    with pytest.raises(TrainingError, match="learn them anew"):
        compare(
            "m", lambda: (slimmable(), Record()), arms, 1, "images", settings(photos), Path("a"), Listener()
        )
    few = arms_of(["paper"], ["stable_sampling"])
    with pytest.raises(TrainingError, match="no effect with 2 widths"):
        compare("m", open_start, few, 1, "images", settings(photos), Path("a"), Listener())
    assert not Path("a").exists()


def test_several_processes_do_not_write_one_comparison(photos, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="one process"):
        run(arms_of(["scala"], []), photos)
    assert not Path("side").exists()


def test_what_was_refused_leaves_its_place_free(photos):
    arms = arms_of(["scala"], [])
    bad = settings(photos, augment=AugmentSettings(scale=(0.9, 0.1)))
    with pytest.raises(TrainingError, match="not a range"):
        compare("model", open_start, arms, 1, "images", bad, Path("side"), Listener())
    assert run(arms, photos, seeds=1)


@pytest.mark.parametrize(
    ("method", "part"),
    [("scala", "isolation"), ("scala", "progressive_transfer"), ("separate", "stable_sampling")],
)
def test_a_part_that_has_no_effect_is_not_left_out_in_silence(method, part):
    with pytest.raises(TrainingError, match="changes nothing"):
        arms_of([method], [part])


def test_the_paper_has_all_its_parts():
    parts = ["isolation", "progressive_transfer", "stable_sampling", "noise_calibration", "teacher"]
    assert len(arms_of(["paper"], [*parts, *parts])) == 6


def test_a_picture_of_the_arms():
    point = {"ratio": 0.5, "gmacs": 0.1, "top1": 50.0, "spread": None, "seeds": [50.0]}
    row = {"arm": "scala", "points": [point], "gmacs_per_image": 1.0, "minutes": 2.0}
    save(arms_picture([row], task_named("classification")), Path("one.svg"))
    assert "<svg" in Path("one.svg").read_text()
    assert columns(row) == {"arm": "scala", "0.5": "50.00", "gmacs_per_image": 1.0, "minutes": 2.0}


def test_gradients_of_the_passes_are_told_apart():
    torch.manual_seed(0)
    weight, unused = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))
    passes = {"1": lambda: weight.pow(2).sum(), "0.5": lambda: weight[:1].sin().sum()}
    Path("grads.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"step": 8}\n{"st')
    log = GradientLog([weight, unused], Path("grads.jsonl"), first=7)
    kept = '{"step": 6}\n'  # drops lines of steps done again, and a line that a full disk cut short
    assert Path("grads.jsonl").read_text() == kept
    for _ in range(2):
        for name, loss in passes.items():
            loss().backward()
            log.add(name)
        log.write(7)
        weight.grad = None
    lines = [json.loads(line) for line in Path("grads.jsonl").read_text().removeprefix(kept).splitlines()]
    alone = {name: torch.autograd.grad(loss(), weight)[0] for name, loss in passes.items()}
    for line in lines:
        assert line["step"] == 7
        assert line["norm"] == pytest.approx(
            {n: gradient.norm().item() for n, gradient in alone.items()},
            rel=1e-4,  # a small difference of large sums
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
