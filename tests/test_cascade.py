"""The cascade against asking one image at a time."""

from pathlib import Path

import pytest
import torch
from conftest import slimmable

from scala_cli.cascade import Cascade, confidence, sweep
from scala_cli.errors import PointError

RATIOS = (0.25, 0.5, 1)


def one_by_one(net, image, threshold, ratios=RATIOS):
    """(logits, how many widths were asked) of a single image."""
    asked = 0
    while True:
        logits, asked = net(image[None], ratios[asked])[0], asked + 1
        if logits.softmax(0).max() >= threshold or asked == len(ratios):
            return logits, asked


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0, 0.25, 0.3, 0.4, 1])
def test_a_cascade_answers_as_if_asked_one_image_at_a_time(threshold):
    net, images = slimmable(), 3 * torch.randn(40, 3, 16, 16)
    wanted, asked = zip(*(one_by_one(net, image, threshold) for image in images), strict=True)
    torch.testing.assert_close(Cascade(net, RATIOS, threshold)(images), torch.stack(wanted))
    if 0.2 < threshold < 0.4:
        assert len(set(asked)) > 1, "the test images must differ"


@torch.no_grad()
def test_a_sweep_counts_what_a_cascade_does():
    net, images, gmacs = slimmable(), 3 * torch.randn(40, 3, 16, 16), [1, 3, 10]
    targets = net(images, 1).argmax(1)
    thresholds = [0, 0.25, 0.3, 0.35, 1]
    logits = torch.stack([net(images, ratio) for ratio in RATIOS])
    for row in sweep(
        confidence(logits), logits.argmax(-1) == targets, [10**9 * each for each in gmacs], thresholds
    ):
        found = [one_by_one(net, image, row["threshold"]) for image in images]
        right = [logits.argmax() == target for (logits, _), target in zip(found, targets, strict=True)]
        assert row["top1"] == pytest.approx(100 * sum(right).item() / 40, abs=1e-4)
        assert row["gmacs"] == pytest.approx(sum(sum(gmacs[:asked]) for _, asked in found) / 40, abs=1e-3)
        assert row["escalated"] == pytest.approx(100 * sum(asked > 1 for _, asked in found) / 40)


def test_a_cascade_climbs():
    for ratios in ([0.5], [0.5, 0.25], [0.5, 0.5], []):
        with pytest.raises(PointError, match="two points or more"):
            Cascade(slimmable(), ratios, 0.8)
    with pytest.raises(PointError, match="not trained"):
        Cascade(slimmable(), [0.3, 1], 0.8)


def test_a_cascade_as_a_user_asks_for_it(scala, tiny, photos):
    words = (
        "eval",
        tiny,
        "--data",
        photos,
        "-j",
        0,
        "--no-amp",
        "--cascade",
        "0.25,1.0",
        "--threshold",
        0.35,
    )
    told = scala(*words, "--plot", "cascade.svg", "--json").json
    assert told["cascade"] == ["0.25", "1"] and told["threshold"] == 0.35
    chosen = next(row for row in told["sweep"] if row["threshold"] == 0.35)
    assert {name: told[name] for name in chosen} == chosen
    alone = scala("eval", tiny, "--data", photos, "-j", 0, "--no-amp", "--json").json["points"]
    assert [row["top1"] for row in told["points"]] == [alone[0]["top1"], alone[-1]["top1"]]
    assert "<svg" in Path("cascade.svg").read_text()
    assert scala(*words, "--ratio", "0.5").code == 2
    assert scala("eval", tiny, "--data", photos, "--threshold", 0.5).code == 2
    assert scala("eval", tiny, "--data", photos, "--plot", "x.svg").code == 2
    assert "no picture" in scala(*words, "--plot", "x.txt").stderr
