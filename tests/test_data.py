"""Reading images: strict, named and counted."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import build, slimmable
from PIL import Image
from runs import Listener

from scala_cli.data.calibration import calibration_images
from scala_cli.data.classes import class_misfit
from scala_cli.data.loader import Loader
from scala_cli.data.samples import FromReader
from scala_cli.data.split import Split, hold_out, open_split
from scala_cli.data.transform import transform_for
from scala_cli.data.workers import ignore_stop_signals, stop_signals_blocked
from scala_cli.errors import DataError
from scala_cli.evaluate import accuracies, evaluate
from scala_cli.models.vit import describe
from scala_cli.settings import AugmentSettings, DeviceSettings, ReadSettings
from scala_cli.watch import Watcher


@pytest.fixture
def folder(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "photos")


def loader(folder, training=False, **read) -> Loader:
    net = slimmable()
    augment = AugmentSettings() if training else None
    settings = ReadSettings(**{"workers": 0, **read})
    split = open_split(str(folder), training)
    return Loader(split, transform_for(net.spec, augment), 4, settings, training=training)


def test_parts_and_classes(folder):
    train, val = open_split(str(folder), True), open_split(str(folder), False)
    assert train.classes == val.classes == ("blue", "green", "red")
    assert (len(train), len(val)) == (12, 6)
    for former, name in (("val", "validation"), ("validation", "test")):
        (folder / former).rename(folder / name)
        assert len(open_split(str(folder), False)) == 6


def test_batches(folder):
    batches = list(loader(folder))
    assert [len(targets) for _, targets in batches] == [4, 2]
    images, targets = batches[0]
    assert images.shape == (4, 3, 16, 16) and targets.tolist() == [0, 0, 1, 1]
    assert images[0, 2].mean() > images[0, 0].mean()  # class blue is blue


def test_order_and_augmentation_depend_on_the_epoch_the_seed_and_the_image_alone(folder):
    """Not on how many processes read, nor on where in the epoch they begin."""
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
    """On textured images, in a fixed order: the same image twice, cropped and mirrored differently."""
    for file in (folder / "train").rglob("*.png"):
        Image.effect_noise((20, 20), 80).convert("RGB").save(file)
    net, split = slimmable(), open_split(str(folder), True)
    once = [transform_for(net.spec)(split.samples[0][0].convert("RGB")) for _ in range(2)]
    varied = [
        transform_for(net.spec, AugmentSettings())(split.samples[0][0].convert("RGB")) for _ in range(2)
    ]
    assert torch.equal(*once) and not torch.equal(*varied)


@pytest.mark.parametrize("policy", ["rand-m10-n8-inc1", "rand-m0-n8"])
def test_the_strongest_posterizing(policy):
    transform = transform_for(slimmable().spec, AugmentSettings(aa=policy))
    transform = pickle.loads(pickle.dumps(transform))  # as processes that are not forked get it
    random.seed(0), np.random.seed(0)
    noise = Image.effect_noise((20, 20), 80).convert("RGB")
    assert all(transform(noise).isfinite().all() for _ in range(40))


def test_what_is_skipped_on_the_way_to_an_order_is_told(folder):
    (folder / "val/red/0.png").write_text("no image")
    skipping, listener = ReadSettings(workers=0, on_corrupt="skip"), Listener()
    list(calibration_images(open_split(str(folder), False), slimmable().spec, skipping, listener))
    assert "unreadable and skipped: 1" in listener.notes[0] and "red/0.png" in listener.notes[0]


def test_not_one_image_that_can_be_read(folder):
    for file in (folder / "val").rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match="not one of the images"):
        evaluate(
            slimmable(),
            loader(folder, on_corrupt="skip"),
            slimmable().points,
            DeviceSettings(amp=False),
            Watcher(),
        )
    skipping = ReadSettings(workers=0, on_corrupt="skip")
    with pytest.raises(DataError, match="not one of the images"):
        list(calibration_images(open_split(str(folder), False), slimmable().spec, skipping, Watcher()))


def test_a_model_for_grey_images_is_refused():
    vit, args = build(in_chans=1)
    with pytest.raises(DataError, match="images of 1 channels"):
        transform_for(describe(vit, args))


def test_classes_are_numbered_as_in_train(folder):
    """A class that has no validation images must not shift the numbers of those after it."""
    shutil.rmtree(folder / "val/blue")
    targets = [target for _, batch in loader(folder) for target in batch.tolist()]
    assert targets == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("spoil", "training", "message"),
    [
        (lambda f: shutil.rmtree(f), True, "no such folder"),
        (lambda f: shutil.rmtree(f / "train"), True, "has no train/"),
        (lambda f: shutil.rmtree(f / "val"), False, "has no val/"),
        (lambda f: [shutil.rmtree(d) for d in (f / "train").iterdir()], True, "no class folders"),
        (lambda f: [p.unlink() for p in (f / "train/green").iterdir()], True, "class 'green' has no images"),
        (lambda f: [p.unlink() for p in (f / "val/red").iterdir()], False, "class 'red' has no images"),
        (lambda f: (f / "val/red").rename(f / "val/pink"), False, "'pink' that train/ does not have"),
        (lambda f: Image.new("RGB", (9, 9)).save(f / "train/stray.png"), True, "in no class folder"),
        (lambda f: shutil.copytree(f / "train/red", f / "train/red/.cache"), True, r"deeper .* '\.cache'"),
    ],
)
def test_malformed_folders(folder, spoil, training, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        open_split(str(folder), training)
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wds/imagenet", "streamed data sets"),
        ("torch/cifar10", "torch/cifar10 in "),
        ("torch/nonsense", "torch/nonsense in "),
        ("nowhere", "no such folder"),
    ],
)
def test_named_data_that_is_not_there(name, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_split(name, True, str(tmp_path))


def test_images_that_lie_in_a_table_are_named_by_their_numbers():
    class Table:
        def filename(self, index, absolute):
            return None

    assert FromReader(Table()).name(3) == "image 3"


def test_classes_are_numbered_as_a_person_counts(folder):
    for part in ("train", "val"):
        for old, new in (("blue", "10"), ("green", "2"), ("red", "1")):
            (folder / part / old).rename(folder / part / new)
    assert open_split(str(folder), True).classes == open_split(str(folder), False).classes == ("1", "2", "10")
    assert open_split(str(folder), False).samples[0][0].getpixel((0, 0)) == (200, 0, 0)  # red's


def test_a_timm_data_set_name(folder):
    split = open_split("torch/image_folder", True, str(folder))
    assert len(split) == 12 and split.classes == ("blue", "green", "red")
    assert split.samples[0][1] == 0 and "torch/image_folder[0]" in split.samples.name(0)


def test_images_of_every_kind_are_read(folder):
    for number, kind in enumerate(("webp", "bmp", "jpg")):
        Image.new("L", (9, 9)).save(folder / f"val/red/new{number}.{kind}")
    assert len(open_split(str(folder), False)) == 9
    assert sum(len(targets) for _, targets in loader(folder)) == 9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40], ids=["text", "empty", "broken"]
)
def test_an_unreadable_image_is_never_replaced(folder, content, workers):
    (folder / "val/green/0.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"green/0\.jpg cannot be read"):
        list(loader(folder, workers=workers))

    skipping = loader(folder, workers=workers, on_corrupt="skip")
    for _ in range(2):  # counted once however often it is met
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


def test_digits():
    train, val = open_split("digits", True), open_split("digits", False)
    assert (len(train), len(val)) == (1437, 360) and len(train.classes) == 10
    image, target = train.samples[0]
    assert image.size == (8, 8) and 0 <= target < 10 and train.samples.name(3) == "digits[3]"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError) as error:
        open_split("digits", True)
    assert "pip install scikit-learn" in error.value.hint


def test_class_misfit():
    data = ("cat", "dog")
    assert class_misfit(data, 2, None) == class_misfit(data, 2, ["cat", "dog"]) == ""
    assert "3 classes, the data has 2" in class_misfit(data, 3, None)
    assert "class 'dog' of the model is 'cat' in the data" in class_misfit(data, 2, ["dog", "cat"])


def test_images_held_out_are_every_nth_and_not_trained_on(photos):
    split = open_split(str(photos), True)
    training, held = hold_out(split, 0.25)
    names = [split.samples.name(index) for index in range(len(split))]
    assert [held.samples.name(i) for i in range(len(held))] == names[3::4]
    kept = [name for name in names if name not in names[3::4]]
    assert [training.samples.name(i) for i in range(len(training))] == kept
    assert len(hold_out(split, 0.4)[1]) == 4
    assert training.samples[3][1] == split.samples[4][1] and held.classes == split.classes
    with pytest.raises(DataError, match="too few"):
        hold_out(split, 0.01)


class Deadly:
    """One image that kills the process which reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def name(self, index):
        return "deadly"


def test_a_reader_that_fails_is_not_called_killed(folder):
    def failing():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
        yield

    reading = loader(folder)
    reading.loader = failing()
    with pytest.raises(RuntimeError, match="Caught"):
        list(reading)


def test_a_reading_process_obeys_its_parent_alone(folder):
    with (
        stop_signals_blocked()
    ):  # as `Loader.read`: threads that torch starts in the process, before ours, hear nothing
        reading = iter(loader(folder, workers=1).loader)
    next(reading)
    (process,) = reading._workers
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    subprocess.run(["kill", "-INT", str(process.pid)], check=True)
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def test_a_reading_process_that_dies_is_told_in_one_line():
    split = Split(Deadly(), ("one",))
    with pytest.raises(DataError, match="was killed") as error:
        list(Loader(split, None, 2, ReadSettings(workers=1)))
    assert "--workers" in error.value.hint


def test_a_reading_process_hears_nothing_before_it_knows_what_to_do(folder, monkeypatch):
    """SIGTERM in the moment between torch's own handlers and ours, where it would end the process."""
    ready = ignore_stop_signals

    def signalled(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        ready(worker)

    monkeypatch.setattr("scala_cli.data.loader.ignore_stop_signals", signalled)
    assert sum(len(images) for images, _ in loader(folder, workers=2)) == 6


def test_a_reading_process_that_dies_while_the_model_answers(folder):
    """torch raises in whatever the main process does then."""

    def answer(images):
        for process in multiprocessing.active_children():
            process.kill()
        time.sleep(20)

    with pytest.raises(DataError, match="was killed"):
        accuracies({1: answer}, loader(folder, workers=1), torch.device("cpu"), Watcher())
