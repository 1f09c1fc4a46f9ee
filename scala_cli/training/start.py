"""Prepares the model that training starts from: classes, order of channels, fit of widths, isolation."""

import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from scala_cli.calibration import Calibration, fit_family
from scala_cli.data.classes import class_misfit
from scala_cli.data.shards import is_shards
from scala_cli.data.split import Split
from scala_cli.errors import DataError, TrainingError
from scala_cli.methods import METHODS, method_named
from scala_cli.methods.base import OFF
from scala_cli.models.checkpoint import Record
from scala_cli.models.dense import kept_reader
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import Spec
from scala_cli.settings import (
    DEFAULT_RATIOS,
    CalibrationSettings,
    FamilySettings,
    MethodSettings,
    Settings,
)
from scala_cli.slicing.own import own_vectors
from scala_cli.slicing.tokens import TokenRule
from scala_cli.tasks.base import Task
from scala_cli.watch import Watcher
from scala_cli.world import World

ONE_FIT = FamilySettings(keep_full=0.0)
"""Fits the family once, whatever the full width loses: the unchanged model teaches it in training."""


def unlearnt(start: SlimmableViT, record: Record, classes: Sequence[str]) -> str:
    """Returns why the model must first learn these classes; "" if it knows them."""
    if record.new_head and len(classes) == start.spec.num_classes:
        return f"none of its {len(classes)} classes has been learnt"
    return class_misfit(classes, start.spec.num_classes, start.spec.label_names)


def is_taught(record: Record, task: Task, method: MethodSettings) -> bool:
    """Whether the frozen starting model teaches.

    Raises TrainingError if there are no labels, so that it has to teach, but it cannot.
    """
    wanted = method.teacher != "none" and (
        not task.labelled or "teacher" in method_named(method.method).parts
    )
    if task.labelled:
        return wanted and record.trained
    if not record.trained:
        raise TrainingError(
            "its weights are random: there are no features to learn.", "Start from pretrained weights."
        )
    if not wanted:
        raise TrainingError(
            "features are learnt from the frozen model, so it has to teach.",
            remedy="leave_out",
            setting="teacher",
        )
    if not method.class_token + method.patch_tokens + method.mask_patches:
        raise TrainingError(
            "neither the class token nor any patch tokens count in the loss.",
            remedy="leave_out",
            setting="class-token",
        )
    return True


def refuse_foreign(chosen: MethodSettings) -> None:
    """Raises TrainingError for a setting that only other methods use."""
    method, default = method_named(chosen.method), MethodSettings()
    others = {name for each in METHODS for name in method_named(each).own} - method.own
    others |= set() if method.masks_patches else {"mask_patches"}
    # what a method has not is off in any case
    others |= {name for name in OFF.keys() - method.parts if getattr(chosen, name) != OFF[name]}
    for name in sorted(others):
        if getattr(chosen, name) != getattr(default, name):
            raise TrainingError(f"{name} has no effect with method {chosen.method}.", "Leave it out.")


def refuse_different(splits: tuple[Split, Split], world: World) -> None:
    """Raises DataError if the processes see different images or classes."""
    (training, validation), classes = splits, splits[0].classes
    counts = f"{len(training)} training and {len(validation)} validation images"
    if not world.same(f"{counts} {classes}"):
        counts += f", of {len(classes)} classes" if classes else ""
        raise DataError(
            f"the processes see different images: number {world.rank} has {counts}.",
            "Give all of them the same images, on a disk that all nodes see.",
        )


def with_new_head(start: SlimmableViT, classes: Sequence[str], seed: int) -> SlimmableViT:
    """Returns a copy with a random head for these classes, the same for the same seed."""
    vit = deepcopy(start.vit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit.reset_classifier(len(classes))
    extra = {name: t for name, t in start.extra.items() if not name.partition(":")[2].startswith("head")}
    return start.like(vit=vit, spec=start.spec.naming(classes), extra={**extra, **kept_reader(start)})


def prepare(
    start: SlimmableViT, record: Record, settings: Settings, images: Split, watch: Watcher
) -> tuple[SlimmableViT, Record]:
    """Returns the model to train: ordered, fitted and isolated as the method and its settings say.

    Channels are put in order unless their order is fixed already. Widths are fitted if only the full width
    has been trained and a narrower one has not been fitted yet.

    Raises TrainingError if fitted widths would be isolated.
    """
    free = record.order_is_free(start.rule)
    chosen = method_named(settings.method.method).effective(settings.method)
    unfitted = [r for r in start.rule.ratios if r < 1 and not own_vectors(start.vectors, r)]
    fit = record.widths_are_free(start.rule) and bool(unfitted) and chosen.calibrate
    if chosen.order == "importance" and (free or fit):
        todo = ["putting the channels in order of importance"] if free else []
        todo += ["fitting the narrower widths"] if fit else []
        watch.note(f"{' and '.join(todo)} on some training images.")
        how, split = CalibrationSettings(calibrate=fit), replace(images, notes=())
        on = Calibration(split, how, settings.read, settings.device, watch)
        start, record, _ = fit_family(start, record, on, ONE_FIT)
    if start.vectors and isolation(start, record, settings):
        raise TrainingError(
            "the widths of this model were fitted to its first channels: they cannot be isolated.",
            remedy="leave_out",
            setting="isolation",
        )
    return start.like(rule=replace(start.rule, isolated=isolation(start, record, settings))), record


def isolation(start: SlimmableViT, record: Record, settings: Settings) -> bool:
    """Whether to train with isolation: as set, else as the checkpoint was trained, else the method's default.

    A checkpoint shows how it was trained only if it had a width between the smallest and the largest. The
    method's default does not apply to ordered channels, whose last ones are the least important.
    """
    if settings.method.isolation is not None:
        return settings.method.isolation
    if len(record.metrics) > 2:
        return start.rule.isolated
    return method_named(settings.method.method).isolated and record.order != "importance"


def record_of_training(record: Record, start: SlimmableViT, settings: Settings, taught: bool) -> Record:
    """Returns the record of the trained model: the starting model's, and how it was trained."""
    former = record.provenance.get("command")
    model = "CKPT" if former else str(record.provenance.get("model", "MODEL"))
    is_local = Path(settings.data).is_dir() or is_shards(settings.data)
    data = Path(settings.data).name if is_local else settings.data
    ratios = ",".join(map(str, start.points))
    blocks, resize = start.spec.tokens.blocks, start.spec.resize
    sizes = [] if former else record.provenance.get("options", [])
    words = [model, "--data", data, *sizes, *(["--ratios", ratios] if ratios != DEFAULT_RATIOS else [])]
    words += ["--tokens", start.spec.tokens.kind] if start.spec.tokens.kind != TokenRule.kind else []
    words += ["--drop-blocks", ",".join(map(str, blocks))] if blocks else []
    words += ["--resize", resize] if resize != Spec.resize else []
    command = shlex.join(["scala", "finetune", *words, *settings.words()])
    origin = {**record.provenance, "data": data, "teacher": taught, "command": command}
    origin |= {"before": former} if former else {}
    return Record(True, settings.method.method, record.order, (), origin, task=record.task)
