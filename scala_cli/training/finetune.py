"""One-shot training: a pretrained ViT becomes a family of every width."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from scala_cli.data import Loader, class_misfit, open_split, transform_for
from scala_cli.device import choose_device, uses_bfloat16
from scala_cli.evaluate import validation_loader
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record, load_with_record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import choose_attention
from scala_cli.settings import Settings
from scala_cli.training.loop import frozen, train
from scala_cli.training.run import Row, Run
from scala_cli.watch import Watcher


def finetune(
    start: SlimmableViT, record: Record, settings: Settings, run: Run, watch: Watcher, force: bool = False
) -> Row:
    """Trains every width of `start` at once and returns the row of the best epoch.

    Where the model's classes are not the data's it gets a new head. The frozen starting model teaches
    the full width where it has been trained for these classes.

    Raises:
        ScalaError: its kinds for data, points, checkpoints and training; nothing is written before all
            of the input has been checked.
    """
    classes = open_split(settings.data, True, settings.read.data_dir).classes
    open_split(settings.data, False, settings.read.data_dir)
    METHODS[settings.method.method](start.points, settings.method)
    misfit = class_misfit(classes, start.spec.num_classes, start.spec.label_names)
    if misfit:
        watch.note(f"{misfit}: the head is new, and there is no teacher.")
        torch.manual_seed(settings.seed)
        start.vit.reset_classifier(len(classes))
    isolated = isolation(start, record, settings)
    start = SlimmableViT(start.vit, start.spec.naming(classes), replace(start.rule, isolated=isolated))
    taught = settings.method.teacher and record.trained and not misfit
    origin = {**record.provenance, "data": Path(settings.data).name, "teacher": taught}
    run.begin(start, Record(record.trained, settings.method.method, (), origin), settings, force)
    return go_on(run, watch)


def go_on(run: Run, watch: Watcher) -> Row:
    """Trains from the last whole epoch of a run, with the settings it was begun with.

    Raises TrainingError where the directory holds no run.
    """
    settings = Settings.of(run.read_state()["settings"])
    device = choose_device(settings.device)
    choose_attention(device, uses_bfloat16(device, settings.device))
    start, record = load_with_record(run.path / "start")
    net = deepcopy(start).to(device)  # the weights of `start` are mapped from its file
    teacher = frozen(start.to(device), settings.device) if record.provenance["teacher"] else None
    batch_size = settings.optimizer.batch_size
    training = Loader(
        open_split(settings.data, True, settings.read.data_dir),
        transform_for(net.spec, settings.augment),
        batch_size,
        settings.read,
        training=True,
        seed=settings.seed,
    )
    validation = validation_loader(net, settings.data, batch_size, settings.read)
    method = METHODS[settings.method.method](net.points, settings.method)
    best = train(net, teacher, method, (training, validation), settings, run, record, watch)
    for loader in (training, validation):
        loader.tell_skipped(watch)
    return best


def isolation(start: SlimmableViT, record: Record, settings: Settings) -> bool:
    """Whether to isolate: as told, else as the checkpoint was trained, else as the method does."""
    if settings.method.isolation is not None:
        return settings.method.isolation
    return start.rule.isolated if record.method else METHODS[settings.method.method].isolated
