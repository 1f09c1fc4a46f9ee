"""One-shot training: makes a family of all widths from a pretrained ViT."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from scala_cli.data.split import Split
from scala_cli.device import choose_device
from scala_cli.errors import DataError, TrainingError
from scala_cli.methods import ONE_POINT, method_named
from scala_cli.models.checkpoint import Record, load_with_record
from scala_cli.models.features import for_task
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.precision import note_emulation
from scala_cli.settings import Settings
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.training.loop import Trainer
from scala_cli.training.run import Row, Run
from scala_cli.training.start import (
    is_taught,
    prepare,
    record_of_training,
    refuse_different,
    refuse_foreign,
    unlearnt,
    with_new_head,
)
from scala_cli.watch import Watcher
from scala_cli.world import World

FULL = Point.of(1)
LEARNING = 1 / 3
"""Share of the epochs for which the full width first trains alone, to learn a new head."""


def finetune(
    start: SlimmableViT, record: Record, settings: Settings, run: Run, watch: Watcher, force: bool = False
) -> Row:
    """Trains every width of `start` at once and returns the row of the best epoch.

    For features, the frozen full width teaches and no labels are used. For classification, a model whose
    classes differ from the data's gets a new head; with a teacher, the full width first learns the classes
    alone, in a separate run, and then teaches.

    Raises:
        ScalaError: its subclasses for data, points, checkpoints and training; nothing is written before all
            input has been checked.
    """
    device = choose_device(settings.device)
    note_emulation(device, settings.device, watch)
    world = World.join(device)
    start, record = for_task(start, record, settings.run.task)
    task = task_named(record.task)
    refuse_foreign(settings.method)
    taught = is_taught(record, task, settings.method)
    splits = task.open(settings, start.spec.label_names, watch)
    refuse_different(splits, world)
    if sizes := [point.size for point in start.points if point.size]:
        if task.masks(settings.method):
            raise TrainingError(
                "mask_patches hides patches of the model's own image size, and points have other sizes.",
                remedy="leave_out",
                setting="mask-patches",
            )
        splits[0].tell_enlarged(max(sizes), watch)
    classes = splits[0].classes
    kind = method_named(settings.method.method)
    method = kind(start.points, settings.method, task)  # refuses points that it does not train
    method.prepared(start, settings.run.seed)  # refuses what it cannot add to
    if len(start.points) == 1 and not kind.one_point:
        watch.note(f"only width {start.points[0]} is trained; for others give --ratios.")
    misfit = unlearnt(start, record, classes) if task.labelled else ""
    if misfit:
        start = with_new_head(start, classes, settings.run.seed)
        if taught and (start.points != (FULL,) or method.adds_modules):
            watch.note(f"{misfit}: the head is new, so the full width learns alone first, then it teaches.")
            return learn_classes_first(start, record, settings, splits, run, watch, force)
        watch.note(f"{misfit}: the head is new, and there is no teacher.")
        taught = False
    elif task.labelled:
        start = start.like(spec=start.spec.naming(classes))
    begun = start
    start, record = prepare(begun, record, settings, splits[0], watch)
    start = method.prepared(start, settings.run.seed)
    # fitting the widths or adding modules changes the full width; then the unchanged model teaches
    changed = method.adds_modules or start.vectors.keys() != begun.vectors.keys()
    teacher = begun if changed else start
    trainer = Trainer(start, task, teacher if taught else None, settings, splits)
    with run.claimed(settings, force):
        if taught and teacher is begun:
            run.save_teacher(teacher, record)
        return begin(trainer, start, record, run, watch)


def resume_run(run: Run, watch: Watcher, changes: Mapping[str, Any] | None = None) -> Row:
    """Resumes a run from its last saved step, with its own settings.

    Args:
        changes: new values for settings in `settings.ON_RESUME`, by name.

    Raises TrainingError if the directory holds no run or another process trains it, DataError if the images
    or classes have changed.
    """
    with run.held():
        return resume_from(run.read_state(), run, watch, changes)


def resume_from(state: dict[str, Any], run: Run, watch: Watcher, changes: Mapping[str, Any] | None) -> Row:
    """Resumes from a saved state, in a run that this process has locked (see `resume_run`)."""
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
        others = {name: new for name, new in (changes or {}).items() if name != "epochs"}
        with watch.aside():
            resume_run(run.teacher, watch, others)
        world.wait()
        points = [Point.of(ratio) for ratio in state["points"]]
        _, record = load_with_record(run.teacher.path / "start")
        splits = task_named(record.task).open(settings, state["images"]["classes"])
        return widen(run, settings, points, splits, watch)
    note_emulation(device, settings.device, watch)
    start, record = load_with_record(run.path / "start")
    task = task_named(record.task)
    splits = task.open(settings, state["images"]["classes"], watch)
    refuse_different(splits, world)
    teacher = run.read_teacher() or start
    trainer = Trainer(start, task, teacher if state["taught"] else None, settings, splits)
    refuse_other_images(trainer.images(), state["images"], run)
    trainer.restore(state)
    refuse_length(trainer, run)
    if len(trainer.rows) < trainer.epochs:
        watch.note(f"resuming after step {trainer.step.number} of {trainer.steps}.")
    return trainer.train(run, record_of_training(record, start, settings, state["taught"]), watch)


def begin(trainer: Trainer, start: SlimmableViT, record: Record, run: Run, watch: Watcher) -> Row:
    """Starts training in a run directory that is locked."""
    taught = trainer.step.frozen is not None
    trainer.measure(watch)
    run.begin(start, record, trainer.state())
    return trainer.train(run, record_of_training(record, start, trainer.settings, taught), watch)


def learn_classes_first(
    start: SlimmableViT,
    record: Record,
    settings: Settings,
    splits: tuple[Split, Split],
    run: Run,
    watch: Watcher,
    force: bool,
) -> Row:
    """Trains the full width alone on new classes, in `run.teacher`; then every width."""
    learning = replace(
        settings,
        method=replace(settings.method, method=ONE_POINT, order="none"),
        optimizer=settings.optimizer.for_share(LEARNING),
    )
    alone = start.with_points([FULL])
    trainer = Trainer(alone, task_named(record.task), None, learning, splits)
    points = [str(point) for point in start.points]
    with run.claimed(settings, force):
        with run.teacher.claimed(learning, force):
            run.teacher.begin(alone, record, trainer.state())
            state = {**trainer.terms(), "settings": asdict(settings), "learning": True, "points": points}
            run.write_state(state)
            with watch.aside():
                trainer.train(run.teacher, record_of_training(record, alone, learning, taught=False), watch)
        trainer.world.wait()
        return widen(run, settings, start.points, splits, watch)


def widen(
    run: Run, settings: Settings, points: Sequence[Point], splits: tuple[Split, Split], watch: Watcher
) -> Row:
    """Trains every width, taught by the full width that learnt the classes in `run.teacher`.

    While it learnt alone, the narrower widths of a trained family fell behind. If their channels are in
    order, they are fitted to it anew.
    """
    net, _ = load_with_record(run.teacher.path / "last")
    _, record = load_with_record(run.teacher.path / "start")
    in_order = record.order == "importance" and not net.rule.isolated
    record = replace(record, new_head=False, metrics=() if in_order else record.metrics)
    start = net.with_points(points)
    start, record = prepare(start, record, settings, splits[0], watch)
    task = task_named(record.task)
    start = method_named(settings.method.method)(start.points, settings.method, task).prepared(
        start, settings.run.seed
    )
    trainer = Trainer(start, task, net, settings, splits)
    return begin(trainer, start, record, run, watch)


def refuse_length(trainer: Trainer, run: Run) -> None:
    """Raises TrainingError if a run is to end before what it has done, or its last epoch was cut short."""
    done, an_epoch = len(trainer.rows), len(trainer.training)
    if trainer.epochs < done or trainer.step.number > trainer.steps:
        raise TrainingError(
            f"this run has trained {trainer.step.number / an_epoch:.4g} epochs already.",
            "Give more epochs, or leave their number out.",
        )
    if trainer.step.number < min(done * an_epoch, trainer.steps):
        raise TrainingError(
            f"its epoch {done} ended before all images had been seen, so nothing can follow it.",
            remedy="from_weights",
            weights=run.weights,
        )


def refuse_other_images(now: Mapping[str, object], then: Mapping[str, object], run: Run) -> None:
    """Raises DataError if a run would resume with other images or classes than it began with."""
    for name, before in then.items():
        if now[name] != before:
            change = f"{before} {name} then, {now[name]} now" if isinstance(before, int) else f"other {name}"
            raise DataError(
                f"the images are not those this run began with: {change}.",
                remedy="from_weights",
                weights=run.weights,
            )
