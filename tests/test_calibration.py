"""Slimming without training, as a user runs it."""

import json
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from conftest import slimmable, write_timm_directory
from PIL import Image

import scala_cli
from scala_cli.errors import PointError
from scala_cli.models.calibrate import calibrate, with_own_vectors
from scala_cli.models.checkpoint import Record
from scala_cli.models.fitted import FittedViT, fit_widths
from scala_cli.models.points import with_untrained
from scala_cli.settings import TokenSettings
from scala_cli.slicing.point import Point, parse_points

QUICK = ("--calibration-images", 24, "-j", 0, "--json")


@torch.no_grad()
def test_a_slice_right_from_a_model_and_unlabelled_images(scala, pictures, images):
    full = write_timm_directory(Path("vit"))
    told = scala("slice", "vit", "--ratio", "0.5", "--data", pictures, *QUICK)
    assert told.code == 0, told.stderr
    assert told.json["calibrated"] and told.json["path"] == "vit-0.5"
    fit = told.json["fit"]
    assert fit["images"] == 21 and fit["held_out"] == 3 and fit["r2"] <= 1
    assert "only fitted to the full model on 24 images without labels" in told.told
    card = " ".join(Path("vit-0.5/README.md").read_text().split())
    assert "fitted to the full model on 24 images" in card
    assert f"On 3 other images the R² of its output is {fit['r2']:.4f}." in card
    assert json.loads(Path("vit-0.5/config.json").read_text())["scala"]["calibrated"] == fit
    again = timm.create_model("local-dir:vit-0.5", pretrained=True).eval()
    plain = scala(
        "slice", "vit", "--ratio", "0.5", "--data", pictures, *QUICK, "--no-calibrate", "-o", "plain"
    )
    assert plain.code == 0 and not plain.json["calibrated"] and "fit" not in plain.json
    assert "nothing is fitted" not in plain.told  # --no-calibrate was given
    ordered = timm.create_model("local-dir:plain", pretrained=True).eval()
    wanted = full(images)
    assert (again(images) - wanted).norm() < (ordered(images) - wanted).norm()


def test_a_family_is_fitted_where_it_has_not_been_trained(scala, tiny, photos):
    words = ("--ratio", "0.5", "--data", photos, *QUICK)
    assert scala("slice", tiny, *words, "-o", "one").json["calibrated"]
    assert (
        scala("convert", "tiny-timm", "--order", "importance", "--data", photos, "-j", 0, "-o", "two").code
        == 0
    )
    assert scala("slice", "two", *words, "-o", "three").json["calibrated"]
    full = scala("slice", tiny, "--ratio", "1", "--data", photos, *QUICK, "-o", "full").json
    assert not full["calibrated"]
    edit = json.loads((tiny / "config.json").read_text())
    edit["scala"] |= {"method": "scala", "metrics": [{"ratio": 0.5, "top1": 50.0, "top5": 100.0}]}
    (tiny / "config.json").write_text(json.dumps(edit))
    trained = scala("slice", tiny, *words, "-o", "trained")
    assert not trained.json["calibrated"] and "nothing is fitted" in trained.told
    assert scala("slice", tiny, *words, "--calibrate", "-o", "asked").json["calibrated"]


def test_what_a_budget_asks_is_measured_on_fitted_slices(scala, tiny, photos):
    """An untrained family has no recorded top-1, but it can be measured if --data has labels."""
    known = scala("eval", tiny, "--data", photos, "--calibrate", *QUICK).json["points"]
    best = max(point["top1"] for point in known)
    told = scala("slice", tiny, "--min-top1", best, "--data", photos, *QUICK, "-o", "best").json
    narrowest = next(point["ratio"] for point in known if point["top1"] >= best)
    assert told["ratio"] == narrowest and [row["top1"] for row in told["candidates"]] == [
        p["top1"] for p in known
    ]
    plain = scala("eval", tiny, "--data", photos, "-j", 0, "--json").json["points"]
    assert plain[-1] == known[-1]  # the full width is not fitted
    timed = scala(
        "bench", tiny, "--data", photos, "--calibrate", *QUICK, "--ratio", "0.5", "--runs", 1, "-b", 1
    )
    assert timed.json["points"][0]["top1"] == known[1]["top1"]
    small = scala("slice", tiny, "--max-gmacs", 1e9, "--data", photos, *QUICK, "-o", "large").json
    assert small["ratio"] == 1 and not small["calibrated"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny", "--ratio", "0.5", "--calibrate"), "--data DIR"),
        (("tiny", "--ratio", "0.5", "--data", "empty"), "holds no images"),
        (("tiny", "--ratio", "0.5", "--data", "text"), "holds no images, but 1 .txt"),
        (("tiny", "--ratio", "0.5", "--img-size", 32), "go with a MODEL"),
        (("vit", "--ratio", "0.3", "--data", "photos"), "not a whole number"),
        (("vit", "--ratio", "0.5"), "not yet a slimmable one"),
        (("nowhere", "--ratio", "0.5", "--data", "photos"), "no model 'nowhere'"),
    ],
)
def test_what_cannot_be_fitted(scala, tiny, photos, words, message):
    Path("empty").mkdir()
    Path("text").mkdir()
    Path("text/notes.txt").write_text("no image")
    Path("photos").symlink_to(photos)
    write_timm_directory(Path("vit"))
    answer = scala("slice", *words, "-o", "out")
    assert answer.code == 2 and message in answer.told and not Path("out").exists()


@pytest.mark.parametrize(("count", "message"), [(1, "one image only"), (12, "images are all the same")])
def test_images_that_tell_nothing_are_refused(scala, tiny, count, message):
    Path("alike").mkdir()
    for number in range(count):
        Image.new("RGB", (9, 9), (40, 90, 10)).save(f"alike/{number}.png")
    for words in (
        ("convert", "tiny-timm", "-o", "out"),
        ("slice", tiny, "--ratio", "0.5", "-o", "out"),
    ):
        answer = scala(*words, "--data", "alike", "-j", 0)
        assert answer.code == 2 and message in answer.told and answer.stdout == ""
        assert not Path("out").exists()


def test_in_python(images):
    net = slimmable(ratios="0.5,1")
    net.train()
    piece, fit = scala_cli.calibrate(net, 0.5, torch.randn(40, 3, 16, 16))
    assert all(module.training for module in net.modules())
    assert piece.embed_dim == 16 and fit.images == 35 and fit.held_out == 5


@torch.no_grad()
def test_a_fitted_family_answers_with_its_slices(images):
    net = slimmable(ratios="0.25,0.5,1")
    seen = [torch.randn(32, 3, 16, 16)]
    family = fit_widths(net, net.points[1:], seen)
    piece, _ = scala_cli.calibrate(net, 0.5, seen)
    for kept in (family, family.with_points(parse_points("0.5,1")), deepcopy(family)):
        assert torch.equal(kept(images, 0.5), piece(images))
        assert torch.equal(kept.slice(0.5)(images), piece(images))
        assert torch.equal(kept(images), net(images))
    assert torch.equal(family(images, 0.25), net(images, 0.25))  # this width was not fitted
    for asked in (0.5, "0.25@160"):  # 0.5 is no longer a point, 0.25@160 never was
        with pytest.raises(PointError, match="was not trained"):
            family.with_points(parse_points("0.25,1"))(images, asked)
    assert family.slice(0.5, fixed_size=True)(images).shape == (3, 5)


@torch.no_grad()
def test_a_fitted_width_takes_fewer_tokens_too(images):
    net, _ = with_untrained(slimmable(), Record(), ["0.5@8~0.7"], TokenSettings())
    fitted = net.slice("0.5")
    for parameter in fitted.parameters():
        parameter.mul_(1.1)
    apart = FittedViT(net, {Fraction(1, 2): fitted}, {})
    assert torch.equal(apart(images, "0.5"), fitted(images))
    small = apart(images, "0.5@8~0.7")
    assert torch.equal(small, apart.slice("0.5@8~0.7")(apart.fitting(images, Point.of("1@8"))))
    assert not torch.allclose(small, net(images, "0.5@8~0.7"))


@torch.no_grad()
def test_points_of_one_width_share_its_fitted_slice(images):
    """Fitted with all tokens, as the largest of the points, and cut from there."""
    net, points = with_untrained(slimmable(), Record(), ["0.5", "0.5~0.7", "0.5@8"], TokenSettings())
    fitted = fit_widths(net, points, [images])
    (alone, _) = calibrate(net, Point.of("0.5@16"), [images])
    assert torch.equal(fitted(images, "0.5"), alone(images))
    for point in ("0.5~0.7", "0.5@8"):
        apart = fitted.slice(point)
        assert torch.equal(fitted(images, point), apart(fitted.fitting(images, fitted.find(point))))
    assert not torch.equal(fitted(images, "0.5~0.7"), fitted(images, "0.5"))


@torch.no_grad()
def test_fitting_a_family_keeps_its_trained_embeddings():
    net, _ = with_untrained(slimmable(), Record(), ["0.5@8"], TokenSettings())
    (name,) = net.positions.keys()
    net.positions[name].add_(5)
    assert torch.equal(with_own_vectors(net).positions[name], net.positions[name])
