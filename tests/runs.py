"""Shared by tests of training: starting models, settings for a few steps, and a watcher."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from conftest import build, slimmable
from safetensors.torch import load_file
from timm.models import VisionTransformer

from scala_cli.data.loader import Loader
from scala_cli.data.split import open_split
from scala_cli.data.transform import transform_for
from scala_cli.models.checkpoint import Record
from scala_cli.models.in_memory import slimmable as from_memory
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import AugmentSettings, DeviceSettings, OptimizerSettings, ReadSettings, Settings
from scala_cli.watch import Watcher

FULL = DeviceSettings(device="cpu", amp=False)
QUICK = ("--epochs", 1, "-b", 4, "-j", 0, "--no-amp", "--device", "cpu")
"""One epoch of a few steps, as options of scala finetune."""


class Listener(Watcher):
    """Records what it is told; raises `kind` at step `stop_at`."""

    def __init__(self, stop_at: int | None = None, kind: type[BaseException] = KeyboardInterrupt):
        self.notes, self.losses, self.rows, self.stop_at, self.kind = [], [], [], stop_at, kind

    def note(self, text):
        self.notes.append(text)

    def step(self, count, losses=None):
        if losses:
            self.losses.append(losses)
            if len(self.losses) == self.stop_at:
                raise self.kind()

    def epoch(self, row):
        self.rows.append(row)


def settings(data, epochs=2, **groups) -> Settings:
    base = Settings(
        str(data),
        optimizer=OptimizerSettings(epochs=epochs, batch_size=4),
        read=ReadSettings(workers=0),
        device=FULL,
    )
    return replace(base, **groups)


def loader(folder, training=False, **read) -> Loader:
    """Returns a loader of a folder's images in batches of 4, for a tiny model."""
    net = slimmable()
    augment = AugmentSettings() if training else None
    chosen = ReadSettings(**{"workers": 0, **read})
    split = open_split(str(folder), training)
    return Loader(split, transform_for(net.spec, augment), 4, chosen, training=training)


def accuracies(*ratios: float) -> list[dict[str, float]]:
    return [{"ratio": ratio, "top1": 1.0} for ratio in ratios]


def start(classes=("blue", "green", "red"), **changes) -> SlimmableViT:
    net = slimmable(**changes)
    net.vit.reset_classifier(len(classes))
    return type(net)(net.vit, net.spec.naming(classes), net.rule)


UNORDERED = Record(order="none")
"""Without ordering: on flat colours rounding decides the basis, so two runs would start differently."""


def same_runs(one: str, other: str) -> bool:
    """Returns whether two runs have equal losses; asserts that weights and records are equal, bit for bit."""
    for checkpoint in ("start", "last", "best"):
        a, b = (load_file(f"{run}/{checkpoint}/model.safetensors") for run in (one, other))
        differing = [name for name in a if not torch.equal(a[name], b[name])]
        assert not differing, checkpoint
    told = [json.loads(Path(run, "last/config.json").read_text())["scala"] for run in (one, other)]
    assert told[0] == told[1]
    rows = (map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) for run in (one, other))
    a, b = ([(row["loss"], row["lr"]) for row in each] for each in rows)
    return a == b


POOLING = {"global_pool": "map", "class_token": False}
"""Arguments with which timm's ViT pools by attention."""


def headless(kind: str = "deit", **changes) -> VisionTransformer:
    """Returns a tiny model without a classifier, of one of KINDS or pooling by attention."""
    special = POOLING if kind == "attention pool" else {}
    return build("vit" if special else kind, num_classes=0, **special, **changes)[0]


def backbone(kind: str = "deit", ratios: str = "0.5,1", **changes) -> SlimmableViT:
    return from_memory(headless(kind, **changes), ratios)
