"""Reading images: batches, augmentation and unreadable files."""

import pickle
import random

import numpy as np
import pytest
import torch
from conftest import build, slimmable
from PIL import Image
from runs import Listener, loader
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform

from scala_cli.data.calibration import calibration_images
from scala_cli.data.split import open_split
from scala_cli.data.transform import transform_for
from scala_cli.errors import DataError
from scala_cli.evaluate import evaluate
from scala_cli.models.vit import describe
from scala_cli.settings import AugmentSettings, DeviceSettings, ReadSettings
from scala_cli.tasks import task_named
from scala_cli.watch import Watcher


def test_batches(folder):
    batches = list(loader(folder))
    assert [len(targets) for _, targets in batches] == [4, 2]
    images, targets = batches[0]
    assert images.shape == (4, 3, 16, 16) and targets.tolist() == [0, 0, 1, 1]
    assert images[0, 2].mean() > images[0, 0].mean()  # class blue is blue


def test_order_and_augmentation_depend_on_the_epoch_the_seed_and_the_image_alone(folder):
    """Not on the number of workers, nor on where in the epoch reading begins."""
    for file in (folder / "train").rglob("*.png"):
        Image.effect_noise((20, 20), 80).convert("RGB").save(file)

    def epoch(number, first=0, workers=0):
        batches = loader(folder, training=True, workers=workers)
        return torch.cat([images for images, _ in batches.of_epoch(number, first)])

    whole = epoch(0)
    assert not torch.equal(whole, epoch(1))
    for workers in (0, 1, 2):
        assert torch.equal(whole, epoch(0, workers=workers))
        assert torch.equal(whole[8:], epoch(0, first=2, workers=workers))


def test_reading_images_leaves_other_random_numbers_alone(folder):
    reading, drawn = loader(folder, training=True), []
    for read in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if read:
            next(reading.of_epoch(0))
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_training_images_are_augmented_and_others_are_not(folder):
    """On textured images, the same image twice is cropped and mirrored differently."""
    for file in (folder / "train").rglob("*.png"):
        Image.effect_noise((20, 20), 80).convert("RGB").save(file)
    net, split = slimmable(), open_split(str(folder), True)
    once = [transform_for(net.spec)(split.samples[0][0].convert("RGB")) for _ in range(2)]
    varied = [
        transform_for(net.spec, AugmentSettings())(split.samples[0][0].convert("RGB")) for _ in range(2)
    ]
    assert torch.equal(*once) and not torch.equal(*varied)


@pytest.mark.parametrize("policy", ["rand-m10-n8-inc1", "rand-m0-n8", "v0", "augmix-m0"])
def test_the_strongest_posterizing(policy):
    transform = transform_for(slimmable().spec, AugmentSettings(aa=policy))
    transform = pickle.loads(pickle.dumps(transform))  # as workers that are not forked get it
    random.seed(0), np.random.seed(0)
    noise = Image.effect_noise((20, 20), 80).convert("RGB")
    assert all(transform(noise).isfinite().all() for _ in range(40))
    assert {LEVEL_TO_ARG[name].__module__ for name in ("Posterize", "PosterizeIncreasing")} == {
        rand_augment_transform.__module__
    }  # timm's own functions stay as they are


def test_images_skipped_in_calibration_are_told(folder):
    (folder / "val/red/0.png").write_text("no image")
    skipping, listener = ReadSettings(workers=0, on_corrupt="skip"), Listener()
    list(calibration_images(open_split(str(folder), False), slimmable().spec, skipping, listener))
    assert "unreadable and skipped: 1" in listener.notes[0] and "red/0.png" in listener.notes[0]


def test_no_image_can_be_read(folder):
    for file in (folder / "val").rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match="none of the images"):
        evaluate(
            slimmable(),
            task_named("classification"),
            loader(folder, on_corrupt="skip"),
            slimmable().points,
            DeviceSettings(amp=False),
            Watcher(),
        )
    skipping = ReadSettings(workers=0, on_corrupt="skip")
    with pytest.raises(DataError, match="none of the images"):
        list(calibration_images(open_split(str(folder), False), slimmable().spec, skipping, Watcher()))


def test_a_model_for_grey_images_is_refused():
    vit, args = build(in_chans=1)
    with pytest.raises(DataError, match="images of 1 channels"):
        transform_for(describe(vit, args))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40], ids=["text", "empty", "broken"]
)
def test_an_unreadable_image_is_never_replaced(folder, content, workers):
    (folder / "val/green/0.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"green/0\.jpg cannot be read"):
        list(loader(folder, workers=workers))

    skipping = loader(folder, workers=workers, on_corrupt="skip")
    for _ in range(2):  # counted once, however often it is read
        assert sum(len(targets) for _, targets in skipping) == 6
    assert list(skipping.skipped) == [str(folder / "val/green/0.jpg")]

    told = []
    watch = Watcher()
    watch.note = told.append
    skipping.tell_skipped(watch)
    assert "unreadable and skipped: 1" in told[0] and "green/0.jpg" in told[0]


def test_a_truncated_jpeg(folder):
    Image.effect_noise((64, 64), 50).save(folder / "val/red/9.jpg")
    whole = (folder / "val/red/9.jpg").read_bytes()
    (folder / "val/red/9.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"red/9\.jpg"):
        list(loader(folder))
