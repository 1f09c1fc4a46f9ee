"""Folders of images: which files are read, which are skipped, and how classes are numbered."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from runs import Listener, loader
from timm.data import get_img_extensions
from timm.utils.misc import natural_key

from scala_cli.data.classes import natural_order
from scala_cli.data.split import open_split
from scala_cli.errors import DataError


def test_parts_and_classes(folder):
    train, val = open_split(str(folder), True), open_split(str(folder), False)
    assert train.classes == val.classes == ("blue", "green", "red")
    assert (len(train), len(val)) == (12, 6)
    for former, name in (("val", "validation"), ("validation", "valid"), ("valid", "test")):
        (folder / former).rename(folder / name)
        assert len(open_split(str(folder), False)) == 6


def test_classes_are_numbered_as_in_train(folder):
    """A class without validation images must not shift the numbers of the classes after it."""
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
        (lambda f: shutil.copytree(f / "train/red", f / "train/red/other"), True, "deeper .* 'red/other'"),
        (lambda f: shutil.move(f / "train/red", f / "train/green/blue"), True, "deeper .* 'green/blue'"),
        (lambda f: (f / "train/blue").rename(f / "train/bl\udce9"), True, "not in UTF-8: 'bl.udce9'"),
    ],
)
def test_malformed_folders(folder, spoil, training, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        open_split(str(folder), training)
    assert error.value.hint or error.value.remedy


def test_classes_are_numbered_as_a_person_counts(folder):
    for part in ("train", "val"):
        for old, new in (("blue", "10"), ("green", "2"), ("red", "1")):
            (folder / part / old).rename(folder / part / new)
    assert open_split(str(folder), True).classes == open_split(str(folder), False).classes == ("1", "2", "10")
    assert open_split(str(folder), False).samples[0][0].getpixel((0, 0)) == (200, 0, 0)  # red's


def test_images_of_every_kind_are_read(folder):
    kinds = ("webp", "bmp", "jpg", "JPEG", "jfif", "tif", "tiff", "gif", "png", "jp2", "ppm")
    for number, kind in enumerate(kinds):
        Image.new("L", (9, 9)).save(folder / f"val/red/new{number}.{kind}")
    split = open_split(str(folder), False)
    assert len(split) == 6 + len(kinds) and not split.notes
    assert sum(len(targets) for _, targets in loader(folder)) == len(split)


ALIKE = ("1", "01", "001", "2", "10", "CAT", "Cat", "cat")
"""Names, several of which are equal in timm's natural sort."""
IN_ORDER = ("001", "01", "1", "2", "10", "CAT", "Cat", "cat")


def with_names_alike(folder):
    """Returns a folder with classes, and images of one class, that timm's natural sort holds for equal."""
    shutil.rmtree(folder / "train")
    for label in ALIKE:
        (folder / "train" / label).mkdir(parents=True)
        Image.new("L", (9, 9)).save(folder / "train" / label / "0.png")
    for name in ALIKE:
        Image.new("L", (9, 9)).save(folder / "train/cat" / f"{name}.png")
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_names_that_are_alike_have_one_order(folder, monkeypatch, seed):
    """Whatever order the disk lists them in."""

    class Shuffled(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    listed, draw = os.scandir, random.Random(seed)
    monkeypatch.setattr(
        "os.scandir", lambda place: Shuffled(draw.sample(all_ := [*listed(place)], len(all_)))
    )
    split = open_split(str(with_names_alike(folder)), True)
    assert split.classes == IN_ORDER
    names = [split.samples.name(index).rpartition("/")[2] for index in range(7, len(split))]
    assert names == ["0.png", *(f"{name}.png" for name in IN_ORDER)]


def test_every_process_numbers_classes_alike(folder):
    """Whatever the hash seed, which decides the order of sets."""
    code = """if 1:
        import sys
        from pathlib import Path
        from scala_cli.data.folder import read_folder
        found = read_folder(Path(sys.argv[1]))
        print([*map(found.find, range(len(found)))], {*found.classes})
    """
    words = [sys.executable, "-c", code, str(with_names_alike(folder) / "train")]
    told = [
        subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in "12"
    ]
    one, two = (each.stdout.partition("]") for each in told)
    assert one[0] == two[0] != "" and one[2] != two[2]  # the sets do differ


def test_the_order_is_timms_where_timm_has_one():
    draw = random.Random(0)
    names = {"".join(draw.choices("ab10 _é.", k=5)).lower() for _ in range(300)}
    names = list({str(natural_key(name)): name for name in names}.values())
    assert sorted(names, key=natural_order) == sorted(names, key=natural_key)


def test_a_digit_that_is_no_number(folder):
    (folder / "train/red").rename(folder / "train/10²")
    assert open_split(str(folder), True).classes == ("10²", "blue", "green")


def test_what_is_passed_over_is_told_once_and_what_is_hidden_is_not(folder):
    red = folder / "train/red"
    for name in ("a.heic", "b.HEIC", "c.txt", "README", ".DS_Store", "._0.png", "Thumbs.db"):
        (red / name).write_text("no image")
    for hidden in (
        folder / "train/.ipynb_checkpoints",
        red / ".ipynb_checkpoints",
        folder / "train/__MACOSX",
    ):
        shutil.copytree(folder / "train/blue", hidden)
    (red / "notes").mkdir()
    split = open_split(str(folder), True)
    assert len(split) == 12 and split.classes == ("blue", "green", "red")
    listener = Listener()
    split.tell(listener)
    assert len(listener.notes) == 1
    assert listener.notes[0].startswith(str(folder / "train"))
    assert listener.notes[0].endswith(": 2 .heic, 1 without a suffix, 1 .txt.")


def test_a_class_without_readable_images_lists_what_it_holds(folder):
    for file in (folder / "train/red").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"class 'red' has no images in .*, but 4 \.heic"):
        open_split(str(folder), True)


def test_two_spellings_of_one_name(folder):
    """macOS stores accents apart from their letters, other systems composed."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    (folder / "train/red").rename(folder / "train" / composed)
    (folder / "val/red").rename(folder / "val" / apart)
    assert open_split(str(folder), True).classes == ("blue", composed, "green")
    assert open_split(str(folder), False).classes == ("blue", composed, "green")
    shutil.copytree(folder / "train/green", folder / "train" / apart)
    with pytest.raises(DataError, match=r"in two ways, 'caf.xe9' and 'cafe.u0301'"):
        open_split(str(folder), True)


def test_test_images_validate_only_if_there_are_no_others_with_a_note(folder):
    shutil.copytree(folder / "val", folder / "test")
    (folder / "val").rename(folder / "valid")
    split = open_split(str(folder), False)
    assert split.samples.name(0).startswith(str(folder / "valid")) and not split.notes
    shutil.rmtree(folder / "valid")
    split = open_split(str(folder), False)
    assert split.samples.name(0).startswith(str(folder / "test"))
    assert "has no val/, so test/ takes its place" in split.notes[0]


def test_folders_are_listed_once_and_training_images_not_at_all_to_validate(folder, monkeypatch):
    seen, listed = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda place: seen.append(str(place)) or listed(place))
    open_split(str(folder), False)
    inner = [str(folder / part / label) for part in ("train", "val") for label in ("blue", "green", "red")]
    assert [seen.count(place) for place in inner] == [0, 0, 0, 1, 1, 1]


def test_timms_own_list_of_suffixes_stays_as_it_is():
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")
