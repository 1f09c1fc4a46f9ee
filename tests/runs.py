"""What tests of training share: a start, settings for a few steps, and somebody who listens."""

from dataclasses import replace

from conftest import slimmable

from scala_cli.data.loader import Loader
from scala_cli.data.split import open_split
from scala_cli.data.transform import transform_for
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import AugmentSettings, DeviceSettings, OptimizerSettings, ReadSettings, Settings
from scala_cli.watch import Watcher

FULL = DeviceSettings(device="cpu", amp=False)
QUICK = ("--epochs", 1, "-b", 4, "-j", 0, "--no-amp", "--device", "cpu")
"""One epoch of a few steps, as options of scala finetune."""


class Listener(Watcher):
    """Remembers all it is told; at a chosen step it pulls the plug."""

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
    """The images of a folder in batches of 4, as a tiny model sees them."""
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
