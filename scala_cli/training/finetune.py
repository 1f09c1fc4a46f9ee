"""One-shot training: a pretrained ViT becomes a family of every width."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from scala_cli.data import Split, calibration_images, class_misfit, hold_out, open_split
from scala_cli.device import choose_device
from scala_cli.errors import ScalaError
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record, load_with_record
from scala_cli.models.order import put_first_what_matters
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import Settings
from scala_cli.slicing.point import Point
from scala_cli.training.loop import Trainer
from scala_cli.training.run import Row, Run
from scala_cli.watch import Watcher

FULL = Point.of(1)


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
    splits = open_splits(settings)
    classes = splits[0].classes
    method = METHODS[settings.method.method](start.points, settings.method)
    if len(start.points) == 1 and settings.method.method != "separate":
        watch.note(f"only width {start.points[0]} is trained; for others give --ratios.")
    misfit = class_misfit(classes, start.spec.num_classes, start.spec.label_names)
    teach = settings.method.teacher != "none" and method.taught and record.trained
    start = SlimmableViT(start.vit, start.spec.naming(classes), start.rule)
    if not misfit:
        return widen(start, record, settings, splits, teach, run, watch, lambda: run.claim(settings, force))
    torch.manual_seed(settings.seed)
    start.vit.reset_classifier(len(classes))
    if not teach or start.points == (FULL,):
        watch.note(f"{misfit}: the head is new, and there is no teacher.")
        return widen(start, record, settings, splits, False, run, watch, lambda: run.claim(settings, force))
    learning = settings_of_teacher(settings)
    epochs = f"{learning.optimizer.epochs:.3g} epochs"
    watch.note(f"{misfit}: the head is new, so the full width learns alone for {epochs}, then it teaches.")
    trainer = Trainer(full_width(start), False, learning, splits)
    run.claim(settings, force)
    run.teacher.claim(learning, force)
    run.teacher.begin(full_width(start), record, trainer.state())
    points = [str(point) for point in start.points]
    run.write_state({"settings": asdict(settings), "learning": True, "points": points})
    with discarding(run, trainer):
        trainer.train(run.teacher, trained_by(record, learning, False), watch)
    return widen_teacher(run, settings, start.points, watch)


def go_on(run: Run, watch: Watcher) -> Row:
    """Trains from the last whole epoch of a run, with the settings it was begun with.

    Raises TrainingError where the directory holds no run.
    """
    state = run.read_state()
    settings = Settings.of(state["settings"])
    if state.get("learning"):
        go_on(run.teacher, watch)
        return widen_teacher(run, settings, [Point.of(ratio) for ratio in state["points"]], watch)
    taught = state["taught"]
    start, record = load_with_record(run.path / "start")
    trainer = Trainer(start, taught, settings, open_splits(settings))
    trainer.restore(state)
    return trainer.train(run, trained_by(record, settings, taught), watch)


def widen_teacher(run: Run, settings: Settings, points: Sequence[Point], watch: Watcher) -> Row:
    """Trains every width from the full one that has learnt new classes in `run.teacher`."""
    net, record = load_with_record(run.teacher.path / "best")
    rule = replace(net.rule, points=tuple(points))
    record = replace(record, method=None, metrics=())
    start = SlimmableViT(net.vit, net.spec, rule)
    return widen(start, record, settings, open_splits(settings), True, run, watch, lambda: None)


def widen(
    start: SlimmableViT,
    record: Record,
    settings: Settings,
    splits: tuple[Split, Split],
    taught: bool,
    run: Run,
    watch: Watcher,
    claim: Callable[[], None],
) -> Row:
    """Puts the channels in order where that is free, and trains every width at once.

    Args:
        claim: called when all has been checked, before anything is written.
    """
    if can_be_ordered(start, record) and settings.method.order == "importance":
        watch.note("putting the channels in order of importance on some training images.")
        device = choose_device(settings.device)
        start.to(device if device.type == "cuda" else "cpu")  # in float64, which not every device has
        start = put_first_what_matters(start, calibration_images(splits[0], start.spec, settings.read, watch))
        record = replace(record, order="importance")
    rule = replace(start.rule, isolated=isolation(start, record, settings))
    start = SlimmableViT(start.vit, start.spec, rule)
    trainer = Trainer(start, taught, settings, splits)
    claim()
    run.begin(start, record, trainer.state())
    with discarding(run, trainer) if not run.teacher.holds_state() else nullcontext():
        return trainer.train(run, trained_by(record, settings, taught), watch)


@contextmanager
def discarding(run: Run, trainer: Trainer) -> Iterator[None]:
    """Removes a run that fails before anything is worth resuming: the next try finds its place free."""
    try:
        yield
    except ScalaError:
        if not trainer.rows:
            run.discard()
        raise


def settings_of_teacher(settings: Settings) -> Settings:
    """How the full width learns new classes before it teaches them."""
    epochs = settings.method.teacher_epochs or settings.optimizer.epochs / 3
    return replace(
        settings,
        method=replace(settings.method, method="separate", order="none"),
        optimizer=replace(settings.optimizer, epochs=epochs),
    )


def full_width(net: SlimmableViT) -> SlimmableViT:
    return SlimmableViT(net.vit, net.spec, replace(net.rule, points=(FULL,)))


def open_splits(settings: Settings) -> tuple[Split, Split]:
    """The training and the validation images; these are held out of the former where asked for."""
    data, place = settings.data, settings.read.data_dir
    training = open_split(data, True, place)
    if settings.holdout:
        return hold_out(training, settings.holdout)
    return training, open_split(data, False, place)


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


def trained_by(record: Record, settings: Settings, taught: bool) -> Record:
    """The record of the model that comes of training: of the one it came from, and how."""
    origin = {**record.provenance, "data": Path(settings.data).name, "teacher": taught}
    return Record(True, settings.method.method, record.order, (), origin)
