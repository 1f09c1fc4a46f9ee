"""Compares methods and their parts: same start, images and seeds, results in one table."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from scala_cli.cost import gmacs
from scala_cli.data.split import refuse_unknown
from scala_cli.errors import TrainingError
from scala_cli.files import whole_file
from scala_cli.lock import LOCK, locked
from scala_cli.methods import METHODS, ONE_POINT, method_named
from scala_cli.methods.base import OFF, Method, Recipe
from scala_cli.models.checkpoint import Record
from scala_cli.models.features import for_task
from scala_cli.models.locate import STATE
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.plot import arms_picture, can_draw, save
from scala_cli.report import write_csv
from scala_cli.settings import MethodSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.swap import remove, target_of
from scala_cli.tasks import TASKS, task_named
from scala_cli.tasks.base import Task, main_column
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.price import Macs, training_macs
from scala_cli.training.run import METRICS, Run
from scala_cli.training.start import is_taught, unlearnt
from scala_cli.watch import Watcher

RESULT, TABLE = "compare.json", "compare.csv"
Start = tuple[SlimmableViT, Record]


@dataclass(frozen=True)
class Arm:
    """One way to train, with its name in the table."""

    name: str
    recipe: Recipe

    @property
    def method(self) -> MethodSettings:
        return self.recipe.settings

    @property
    def kind(self) -> type[Method]:
        return method_named(self.method.method)

    def of(self, start: Start) -> Start:
        """Returns the start with this arm's slicing rule."""
        net, record = start
        rule = replace(net.rule, layout=self.recipe.layout, attn_scale=self.recipe.attn_scale)
        return net.like(rule=rule), record

    def without(self, part: str) -> "Arm":
        """Returns the arm without one of its parts. Raises TrainingError for a part it does not have."""
        if part not in OFF:
            raise TrainingError(f"there is no part {part!r}.", f"Parts are {', '.join(OFF)}.")
        method = replace(self.method, **{part: OFF[part]})
        if part == "order" and method.isolation is None:
            method = replace(method, isolation=False)  # as with ordering, so that only one part differs
        if self.kind.effective(method) == self.kind.effective(self.method):
            raise TrainingError(
                f"{part} has no effect in {self.name}: leaving it out changes nothing.", remedy="whole_method"
            )
        return Arm(f"{self.name}-no-{part.replace('_', '-')}", replace(self.recipe, settings=method))


def recipes() -> dict[str, Recipe]:
    """Returns what can be compared: every method with default settings, and its named variants."""
    found: dict[str, Recipe] = {}
    for name in METHODS:
        found |= {name: Recipe(MethodSettings(method=name)), **method_named(name).recipes}
    return found


def arms_of(methods: Sequence[str], without: Sequence[str]) -> list[Arm]:
    """Returns an arm for every method, and one for every method without each of the parts.

    Raises TrainingError for an unknown name, or a part whose absence would change nothing.
    """
    known = recipes()
    unknown = [name for name in methods if name not in known]
    if unknown or not methods:
        raise TrainingError(
            f"there is no method {unknown[0]!r}." if unknown else "no method is given.",
            f"Methods are {', '.join(known)}.",
        )
    whole = [Arm(name, known[name]) for name in dict.fromkeys(methods)]
    return [*whole, *(arm.without(part) for arm in whole for part in dict.fromkeys(without))]


def compare(
    model: str,
    open_start: Callable[[], Start],
    arms: Sequence[Arm],
    seeds: int,
    equal: Literal["images", "macs"],
    settings: Settings,
    folder: Path,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Trains every arm with every seed and returns one row for each arm, as in compare.json.

    An interrupted comparison resumes where it stopped. It reports the last epoch, not the best, which would
    be chosen on the same images that it is reported for.

    Args:
        model: the start's name, as the user gave it.
        equal: "images" trains every arm on as many images as `settings` says; "macs" scales the epochs so
            that every arm spends as many multiply-accumulates in training as the first.

    Raises:
        TrainingError: if `folder` holds another comparison, or the start is unsuitable. Others as `finetune`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainingError("compare runs in one process.", remedy="one_process")
    refuse_unknown(settings.data, settings.read.data_dir)  # before anything is downloaded
    net, record = for_task(*open_start(), settings.run.task)
    refuse_unfit(net, record, arms, settings)
    what: dict[str, Any] = {
        "model": model,
        "ratios": [str(point) for point in net.points],
        "arms": [arm.name for arm in arms],
        "equal": equal,
        "data": [settings.data, settings.read.data_dir],
        "amp": settings.device.amp,
        "settings": settings.words(),
    }
    if any(point.keep < 1 for point in net.points):
        what["drop_blocks"] = [*net.spec.tokens.places(len(net.vit.blocks))]
        what["tokens"] = net.spec.tokens.kind
    if any(point.size for point in net.points):
        what["resize"] = net.spec.resize
    task = task_named(record.task)
    costs = {arm.name: Macs.of(prepared(arm, net, task)) for arm in arms}
    first = training_macs(costs[arms[0].name], arms[0].method, record.task, record.trained)
    with claimed(folder, what):
        rows = []
        for arm in arms:
            macs = costs[arm.name]
            spent = training_macs(macs, arm.method, record.task, record.trained)
            optimizer = settings.optimizer.for_share(first / spent if equal == "macs" else 1)
            runs = []
            for number in range(seeds):
                seed = settings.run.seed + number
                watch.note(f"{arm.name}, seed {seed} ({number + 1} of {seeds})")
                chosen = replace(
                    settings,
                    method=arm.method,
                    optimizer=optimizer,
                    run=replace(settings.run, seed=seed),
                )
                runs.append(train(arm, open_start, net.points, chosen, folder / arm.name / str(seed), watch))
            about = {"arm": arm.name, "epochs": round(optimizer.epochs, 4), "gmacs_per_image": gmacs(spent)}
            rows.append(about | summary(runs, macs.points, main_column(task), task.digits))
            write(folder, what, rows)
        if can_draw():
            save(arms_picture(rows, task), folder / "compare.svg")
        return rows


def prepared(arm: Arm, net: SlimmableViT, task: Task) -> SlimmableViT:
    """Returns the start with the modules that an arm's method adds, which change its cost."""
    return arm.kind(net.points, arm.method, task).prepared(net, 0) if arm.kind.adds_modules else net


def refuse_unfit(net: SlimmableViT, record: Record, arms: Sequence[Arm], settings: Settings) -> None:
    """Raises TrainingError unless every arm can train from this start, and the start knows the classes."""
    for idle in filter(None, (arm.kind.idle(arm.method, net.points) for arm in arms)):
        raise TrainingError(
            f"{idle}.",
            "Give five or more.",
            remedy="example",
            setting="ratios",
            value="0.25,0.375,0.5,0.625,0.75,0.875,1",
        )
    task = task_named(record.task)
    for arm in arms:
        is_taught(record, task, arm.method)
        for points in [(point,) for point in net.points] if arm.kind.one_point else [net.points]:
            arm.kind(points, arm.method, task)  # refuses points that it does not train
    classes = task.open(settings, net.spec.label_names)[0].classes
    misfit = unlearnt(net, record, classes) if task.labelled else ""
    if misfit:
        raise TrainingError(
            f"{misfit}: every method would learn them anew.", remedy="learn_classes", method=ONE_POINT
        )
    if record.trained and not record.order_is_free(net.rule):
        raise TrainingError(
            "this model's channels are in order already, or narrow widths have been trained.",
            "Compare from the pretrained weights it came from.",
        )


def train(
    arm: Arm,
    open_start: Callable[[], Start],
    points: Sequence[Point],
    settings: Settings,
    place: Path,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Trains one arm with one seed, in one run or in one for each point, and returns the rows of all epochs.

    Only the last epoch of each run keeps its "points".
    """
    alone = arm.kind.one_point
    rows = []
    for widths in [(point,) for point in points] if alone else [points]:
        run = Run(place / widths[0].file_name if alone else place)
        if run.holds_state():
            resume_run(run, watch)
        else:
            net, record = arm.of(open_start())
            finetune(net.with_points(widths), record, settings, run, watch, force=True)
        lines = (run.path / METRICS).read_text(encoding="utf-8").splitlines()
        *earlier, last = map(json.loads, lines)
        rows += [{**row, "points": []} for row in earlier] + [last]
    return rows


def summary(
    runs: Sequence[Sequence[dict[str, Any]]], macs: Mapping[Point, int], column: str, digits: int = 2
) -> dict[str, Any]:
    """Returns each point's mean and standard deviation of a metric over the seeds, and minutes per seed.

    Args:
        runs: the rows of all epochs, for every seed.
        macs: multiply-accumulates of one image at each point.
        column: the metric.
        digits: its number of decimals.
    """
    seeds = [{Point.of_row(each): each[column] for row in rows for each in row["points"]} for rows in runs]
    points = [
        {
            **point.columns(),
            "gmacs": gmacs(macs[point]),
            column: round(fmean(seed[point] for seed in seeds), digits),
            "spread": round(stdev([seed[point] for seed in seeds]), digits) if len(seeds) > 1 else None,
            "seeds": [seed[point] for seed in seeds],
        }
        for point in sorted(seeds[0])
    ]
    return {
        "points": points,
        "minutes": round(fmean(sum(row["minutes"] for row in rows) for rows in runs), 1),
    }


@contextmanager
def claimed(folder: Path, what: dict[str, Any]) -> Iterator[None]:
    """Locks a folder for a new comparison, or to resume the same one.

    Raises TrainingError if it holds something else, or another process trains in it.
    """
    try:
        held = json.loads((folder / RESULT).read_text(encoding="utf-8"))["of"]
    except (OSError, ValueError, KeyError, TypeError):
        held = None
    inside = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
    begun = {name for name in inside if target_of(name) in (RESULT, TABLE)}
    if held is None and inside.keys() - begun - {LOCK}:
        raise TrainingError(f"{folder} holds files that do not belong to a comparison.", remedy="other_place")
    if held != what and any(folder.rglob(STATE)):
        raise TrainingError(f"{folder} holds another comparison.", remedy="other_place")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for name in begun:  # left by a killed process
            remove(inside[name])
        write(folder, what, [])
        yield


def write(folder: Path, what: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows so far, as JSON and as CSV."""
    with whole_file(folder / RESULT) as file:
        file.write_text(json.dumps({"of": what, "arms": rows}, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / TABLE) as file:
        write_csv(file, [columns(row) for row in rows])


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the table, with mean ± standard deviation over the seeds for each point."""
    digits = next(task.digits for task in TASKS.values() if main_column(task) in row["points"][0])
    means = {
        Point.of_row(point).label: f"{fmean(point['seeds']):.{digits}f}"
        + ("" if point["spread"] is None else f" ± {point['spread']:.{digits}f}")
        for point in row["points"]
    }
    return {"arm": row["arm"], **means, "gmacs_per_image": row["gmacs_per_image"], "minutes": row["minutes"]}
