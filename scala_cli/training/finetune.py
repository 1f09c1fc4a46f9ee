"""One-shot training: a pretrained ViT becomes a family of every width."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scala_cli.data.loader import calibration_images
from scala_cli.data.split import Split, class_misfit, hold_out, open_split
from scala_cli.device import choose_device, note_emulation
from scala_cli.errors import DataError, TrainingError
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record, load_with_record
from scala_cli.models.order import put_first_what_matters
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import DEFAULT_RATIOS, Settings
from scala_cli.slicing.point import Point
from scala_cli.training.loop import Trainer
from scala_cli.training.run import Row, Run
from scala_cli.watch import Watcher
from scala_cli.world import World

FULL = Point.of(1)
LEARNING = 1 / 3
"""Epochs in which a new head is learnt by the full width alone, for one of all widths."""


def finetune(
    start: SlimmableViT, record: Record, settings: Settings, run: Run, watch: Watcher, force: bool = False
) -> Row:
    """Trains every width of `start` at once and returns the row of the best epoch.

    Where the model's classes are not the data's it gets a new head, and its full width learns them first,
    alone, in a run of its own. The frozen model teaches wherever it has been trained for these classes.

    Raises:
        ScalaError: its kinds for data, points, checkpoints and training; nothing is written before all
            of the input has been checked.
    """
    device = choose_device(settings.device)
    note_emulation(device, settings.device, watch)
    World.join(device)
    splits = open_splits(settings)
    classes = splits[0].classes
    method = METHODS[settings.method.method](start.points, settings.method)
    if len(start.points) == 1 and settings.method.method != "separate":
        watch.note(f"only width {start.points[0]} is trained; for others give --ratios.")
    taught = settings.method.teacher != "none" and method.taught and record.trained
    misfit = unlearnt(start, record, classes)
    start = SlimmableViT(start.vit, start.spec.naming(classes), start.rule)
    if misfit:
        torch.manual_seed(settings.run.seed)
        start.vit.reset_classifier(len(classes))
        if taught and start.points != (FULL,):
            watch.note(f"{misfit}: the head is new, so the full width learns alone first, then it teaches.")
            return learn_classes_first(start, record, settings, splits, run, watch, force)
        watch.note(f"{misfit}: the head is new, and there is no teacher.")
        taught = False
    start, record = prepare(start, record, settings, splits[0], watch)
    trainer = Trainer(start, taught, settings, splits)
    with run.claimed(settings, force):
        return begin(trainer, start, record, run, watch)


def go_on(run: Run, watch: Watcher, changes: Mapping[str, Any] | None = None) -> Row:
    """Trains from the last saved step of a run, with the settings it was begun with.

    Args:
        changes: other values of `settings.ON_RESUME`, by name.

    Raises TrainingError where the directory holds no run, or one that another process trains, DataError where
    the images or classes are others.
    """
    with run.held():
        return go_on_from(run.read_state(), run, watch, changes)


def go_on_from(state: dict[str, Any], run: Run, watch: Watcher, changes: Mapping[str, Any] | None) -> Row:
    """Trains from a state that was saved, as `go_on`, in a run that this process holds."""
    settings = Settings.of(state["settings"], changes)
    device = choose_device(settings.device)
    world = World.join(device)
    share, rest = divmod(state["images_per_step"], world.size)
    if rest:
        raise TrainingError(
            f"{world.size} processes cannot share the {state['images_per_step']} images of this run's steps.",
            "Resume it with a number of processes that divides that.",
        )
    if state["processes"] != world.size:
        settings = replace(settings, optimizer=replace(settings.optimizer, batch_size=share))
    if state.get("learning"):
        run.write_state({**state, "settings": asdict(settings), "processes": world.size})
        go_on(run.teacher, watch, changes)
        world.wait()
        points = [Point.of(ratio) for ratio in state["points"]]
        return widen(run, settings, points, open_splits(settings), watch)
    note_emulation(device, settings.device, watch)
    start, record = load_with_record(run.path / "start")
    trainer = Trainer(start, state["taught"], settings, open_splits(settings))
    refuse_other_images(trainer.images(), state["images"], run)
    trainer.restore(state)
    if len(trainer.rows) < trainer.epochs:
        watch.note(f"going on after step {trainer.step.number} of {trainer.steps}.")
    return trainer.train(run, trained_by(record, start.points, settings, state["taught"]), watch)


def prepare(
    start: SlimmableViT, record: Record, settings: Settings, images: Split, watch: Watcher
) -> tuple[SlimmableViT, Record]:
    """The start as it is trained: its channels in order where that is free, isolated or not."""
    if can_be_ordered(start, record) and settings.method.order == "importance":
        watch.note("putting the channels in order of importance on some training images.")
        device = choose_device(settings.device)
        start.to(device if device.type == "cuda" else "cpu")  # in float64, which not every device has
        start = put_first_what_matters(start, calibration_images(images, start.spec, settings.read, watch))
        record = replace(record, order="importance")
    rule = replace(start.rule, isolated=isolation(start, record, settings))
    return SlimmableViT(start.vit.cpu(), start.spec, rule), record  # training copies it to its device


def begin(trainer: Trainer, start: SlimmableViT, record: Record, run: Run, watch: Watcher) -> Row:
    """Trains in a directory that has been claimed."""
    taught = trainer.step.frozen is not None
    run.begin(start, record, trainer.state())
    return trainer.train(run, trained_by(record, start.points, trainer.settings, taught), watch)


def learn_classes_first(
    start: SlimmableViT,
    record: Record,
    settings: Settings,
    splits: tuple[Split, Split],
    run: Run,
    watch: Watcher,
    force: bool,
) -> Row:
    """Trains the full width alone, in `run.teacher`, on classes that are new to it; then every width."""
    learning = replace(
        settings,
        method=replace(settings.method, method="separate", order="none"),
        optimizer=replace(settings.optimizer, epochs=settings.optimizer.epochs * LEARNING),
    )
    alone = SlimmableViT(start.vit, start.spec, replace(start.rule, points=(FULL,)))
    trainer = Trainer(alone, False, learning, splits)
    points = [str(point) for point in start.points]
    with run.claimed(settings, force):
        with run.teacher.claimed(learning, force):
            run.teacher.begin(alone, record, trainer.state())
            state = {**trainer.terms(), "settings": asdict(settings), "learning": True, "points": points}
            run.write_state(state)
            trainer.train(run.teacher, trained_by(record, alone.points, learning, taught=False), watch)
        trainer.world.wait()
        return widen(run, settings, start.points, splits, watch)


def widen(
    run: Run, settings: Settings, points: Sequence[Point], splits: tuple[Split, Split], watch: Watcher
) -> Row:
    """Trains every width, taught by the full one that has learnt its classes in `run.teacher`."""
    net, _ = load_with_record(run.teacher.path / "last")
    _, record = load_with_record(run.teacher.path / "start")
    record = replace(record, new_head=False)
    start = SlimmableViT(net.vit, net.spec, replace(net.rule, points=tuple(points)))
    start, record = prepare(start, record, settings, splits[0], watch)
    return begin(Trainer(start, True, settings, splits), start, record, run, watch)


def open_splits(settings: Settings) -> tuple[Split, Split]:
    """The training and the validation images; these are held out of the former where asked for."""
    data, place = settings.data, settings.read.data_dir
    training = open_split(data, True, place)
    if len(training.classes) < 2:
        raise DataError(
            f"{data} holds one class only, {training.classes[0]!r}.", "Give images of two or more."
        )
    if settings.run.holdout:
        return hold_out(training, settings.run.holdout)
    return training, open_split(data, False, place, training.classes)


def refuse_other_images(now: Mapping[str, object], then: Mapping[str, object], run: Run) -> None:
    """Raises DataError where a run would go on with other images or classes than it began with."""
    for name, before in then.items():
        if now[name] != before:
            change = f"{before} {name} then, {now[name]} now" if isinstance(before, int) else f"other {name}"
            raise DataError(
                f"the images are not those this run began with: {change}.",
                f"Go on from its weights instead: scala finetune {run.weights} --data DIR",
            )


def unlearnt(start: SlimmableViT, record: Record, classes: Sequence[str]) -> str:
    """Why the model has to learn these classes first; empty where it knows them."""
    if record.new_head and len(classes) == start.spec.num_classes:
        return f"none of its {len(classes)} classes has been learnt"
    return class_misfit(classes, start.spec.num_classes, start.spec.label_names)


def can_be_ordered(start: SlimmableViT, record: Record) -> bool:
    """Whether the order of the channels is still free: trained at full width alone, and not decided yet."""
    narrow = any(Point.of(metric["ratio"]).ratio < 1 for metric in record.metrics)
    return record.trained and record.order is None and not narrow and start.rule.layout == "aligned"


def isolation(start: SlimmableViT, record: Record, settings: Settings) -> bool:
    """Whether to isolate: as told, else as the checkpoint was trained, else as the method does.

    Only training with a width between the smallest and the largest leaves a mark. Where the best channels
    come first, the other end has the worst, so nothing is isolated.
    """
    if settings.method.isolation is not None:
        return settings.method.isolation
    if len(record.metrics) > 2:
        return start.rule.isolated
    return METHODS[settings.method.method].isolated and record.order != "importance"


def trained_by(record: Record, points: Sequence[Point], settings: Settings, taught: bool) -> Record:
    """The record of the model that comes of training: of the one it came from, and how."""
    former = record.provenance.get("command")
    model = "CKPT" if former else str(record.provenance.get("model", "MODEL"))
    data = Path(settings.data).name if Path(settings.data).is_dir() else settings.data
    ratios = ",".join(map(str, points))
    words = [model, "--data", data, *(["--ratios", ratios] if ratios != DEFAULT_RATIOS else [])]
    command = shlex.join(["scala", "finetune", *words, *settings.words()])
    origin = {**record.provenance, "data": data, "teacher": taught, "command": command}
    origin |= {"before": former} if former else {}
    return Record(True, settings.method.method, record.order, (), origin)
