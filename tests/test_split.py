"""Data sets: their images, and whether their classes match the model's."""

from pathlib import Path

import pytest
from runs import Listener, settings, start

from scala_cli.data.classes import class_misfit
from scala_cli.data.samples import FromReader
from scala_cli.data.split import hold_out, open_split
from scala_cli.errors import DataError
from scala_cli.evaluate import validation_loader
from scala_cli.models.checkpoint import Record, load
from scala_cli.settings import ReadSettings, RunSettings
from scala_cli.tasks import task_named
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.run import Run
from scala_cli.training.start import refuse_different
from scala_cli.world import World

TASK = task_named("classification")


def test_class_misfit():
    data = ("cat", "dog")
    assert class_misfit(data, 2, None) == class_misfit(data, 2, ["dog", "cat"]) == ""
    assert class_misfit(("caf\u00e9", "dog"), 2, ["cafe\u0301", "dog"]) == ""
    assert class_misfit(("crane", "crane"), 2, ["crane", "crane"]) == ""
    assert class_misfit(data, 0, None) == "the model has no classes, it gives features"
    assert "3 classes, the data has 2" in class_misfit(data, 3, None)
    assert "class 'dog' that the model does not know" in class_misfit(data, 2, ["wolf", "cat"])
    assert "several classes of the same name" in class_misfit(data, 3 - 1, ["cat", "dog", "dog"])


def test_classes_are_numbered_as_in_the_models_head(folder):
    names = ("red", "blue", "green")
    net, read = start(names), ReadSettings(workers=0)
    found = validation_loader(net, TASK, str(folder), 4, read)
    assert found.split.classes == names
    (images, targets), *_ = found
    assert targets.tolist() == [1, 1, 2, 2] and images[0, 2].mean() > images[0, 0].mean()  # blue is blue
    for holdout in (0.0, 0.25):
        for split in TASK.open(settings(folder, run=RunSettings(holdout=holdout)), names):
            assert split.classes == names
            for index in range(len(split)):
                assert f"/{names[split.samples[index][1]]}/" in split.samples.name(index)
    with pytest.raises(DataError, match="class 'red' that the model does not know"):
        validation_loader(start(("rot", "blue", "green")), TASK, str(folder), 4, read)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_keeps_the_order_of_the_head_and_goes_on_with_it(folder):
    """The weights were trained on these classes, so the head is not new."""
    names, listener = ("red", "blue", "green"), Listener(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            start(names, ratios="0.5,1"), Record(order="none"), settings(folder), Run(Path("run")), listener
        )
    assert not any("head is new" in note for note in listener.notes)
    resume_run(Run(Path("run")), listener)
    assert load(Path("run/last")).spec.label_names == names


def test_processes_that_see_other_images_say_so(folder, monkeypatch):
    """Processes see only sums; here the other process's number is larger by one."""
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    others = 0
    monkeypatch.setattr(World, "sum", lambda _, tensor: tensor * 2 + others)
    splits = TASK.open(settings(folder))
    refuse_different(splits, World(1, 2))
    others = 1
    with pytest.raises(DataError, match="number 1 has 12 training and 6 validation images, of 3 classes"):
        refuse_different(splits, World(1, 2))


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


def test_a_timm_data_set_name(folder):
    split = open_split("torch/image_folder", True, str(folder))
    assert len(split) == 12 and split.classes == ("blue", "green", "red")
    assert split.samples[0][1] == 0 and "torch/image_folder[0]" in split.samples.name(0)


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
