"""The cascade, compared with running one image at a time."""

import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import slimmable

from scala_cli.cascade import Cascade, best_cascade, confidence, sweep
from scala_cli.errors import PointError

RATIOS = (0.25, 0.5, 1)


def one_by_one(net, image, threshold, ratios=RATIOS):
    """Returns (logits, how many widths ran) for a single image."""
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
    assert "not a picture file" in scala(*words, "--plot", "x.txt").stderr


def test_the_best_cascade_is_that_of_trying_all():
    """Tries all singles, pairs and triples of the points on the front."""
    torch.manual_seed(0)
    macs = [10**9, 2 * 10**9, 2 * 10**9, 4 * 10**9, 9 * 10**9]
    hard = torch.rand(300)
    skill = torch.tensor([0.5, 0.6, 0.4, 0.55, 0.9])[:, None]
    right = hard < skill
    sure = (skill - hard + 0.2 * torch.randn(5, 300)).sigmoid()
    thresholds = [0.3, 0.5, 0.6]
    front = (0, 1, 4)
    for budget in (0.5, 1, 1.7, 3, 5, 20):
        wanted = []
        for members in [m for size in (1, 2, 3) for m in combinations(front, size)]:
            for threshold in thresholds if len(members) > 1 else [0.0]:
                hits, spent = 0, 0.0
                for image in range(300):
                    for n, member in enumerate(members):
                        spent += macs[member] / 1e9
                        if sure[member, image] >= threshold or n == len(members) - 1:
                            hits += right[member, image].item()
                            break
                if round(spent / 300, 4) <= budget:
                    wanted.append((hits / 3, -spent, members, threshold))
        found = best_cascade(sure, right, macs, budget, thresholds)
        if not wanted:
            assert found is None
            continue
        top1, _, members, threshold = max(wanted)
        assert found["top1"] == pytest.approx(top1, abs=1e-3)
        assert (found["members"], found["threshold"]) == (members, threshold)


def test_a_cascade_is_found_for_a_budget(scala, tiny, photos):
    words = ("eval", tiny, "--data", photos, "-j", 0, "--no-amp", "--cascade", "auto")
    told = scala(*words, "--max-gmacs", 1, "--json").json
    assert told["gmacs"] <= 1 and 1 <= len(told["cascade"]) <= 3 and len(told["points"]) == 4
    few = scala(*words, "--max-gmacs", 0)
    assert few.code == 2 and "no point costs 0 GMACs or less" in few.told
    assert scala(*words).code == 2
    assert scala(*words, "--max-gmacs", 1, "--threshold", 0.5).code == 2
    assert scala(*words, "--max-gmacs", 1, "--resized").code == 2
    shutil.copytree(photos, "single")
    for image in sorted(Path("single/val").rglob("*.png"))[1:]:
        image.unlink()
    for folder in [*Path("single/val").iterdir()]:
        if not any(folder.iterdir()):
            folder.rmdir()
    one = scala("eval", tiny, "--data", "single", "-j", 0, "--cascade", "auto", "--max-gmacs", 1)
    assert one.code == 2 and "others to judge it on" in one.told, one.stderr
    assert scala("eval", tiny, "--data", photos, "--max-gmacs", 1).code == 2
