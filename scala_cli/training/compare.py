"""Methods and their parts side by side: the same start, images and seeds, one table."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from scala_cli.errors import TrainingError
from scala_cli.files import refuse_occupied, whole_file
from scala_cli.measure import cost
from scala_cli.methods import METHODS
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.report import write_csv
from scala_cli.settings import MethodSettings, Settings
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import AttnScale
from scala_cli.slicing.table import Layout
from scala_cli.training.finetune import finetune, go_on
from scala_cli.training.run import METRICS, Run
from scala_cli.watch import Watcher

RESULT = "compare.json"
Start = tuple[SlimmableViT, Record]


@dataclass(frozen=True)
class Arm:
    """One way to train, under the name it has in the table."""

    name: str
    method: MethodSettings
    layout: Layout = "aligned"
    attn_scale: AttnScale = "native"

    def of(self, start: Start) -> Start:
        """The start as this arm cuts it."""
        net, record = start
        rule = replace(net.rule, layout=self.layout, attn_scale=self.attn_scale)
        return SlimmableViT(net.vit, net.spec, rule), record

    def without(self, part: str) -> "Arm":
        """The arm less one of its parts. Raises TrainingError for a part it does not have."""
        if part not in PARTS:
            raise TrainingError(f"there is no part {part!r}.", f"Parts are {', '.join(PARTS)}.")
        return replace(
            self,
            name=f"{self.name}-no-{part.replace('_', '-')}",
            method=replace(self.method, **{part: PARTS[part]}),
        )


PARTS: dict[str, Any] = {
    "order": "none",
    "teacher": "none",
    **{part.name: False for part in fields(MethodSettings) if part.type in (bool, bool | None)},
}
"""What --without can leave out, with the setting that does."""

ARMS: dict[str, Arm] = {
    "scala": Arm("scala", MethodSettings()),
    # what the authors' released code does with pretrained weights (Table 8): qkv cut as one block
    "paper": Arm(
        "paper",
        MethodSettings(order="none", isolation=True, teacher="full", label_weight=1),
        "fused",
        "fixed",
    ),
    "usnet": Arm("usnet", MethodSettings(method="usnet")),
    "separate": Arm("separate", MethodSettings(method="separate")),
}


def arms_of(methods: Sequence[str], without: Sequence[str]) -> list[Arm]:
    """Every method, and every method less each of the parts. Raises TrainingError for an unknown name."""
    unknown = [name for name in methods if name not in ARMS]
    if unknown or not methods:
        raise TrainingError(
            f"there is no method {unknown[0]!r}." if unknown else "no method is given.",
            f"Methods are {', '.join(ARMS)}.",
        )
    whole = [ARMS[name] for name in dict.fromkeys(methods)]
    return [*whole, *(arm.without(part) for arm in whole for part in without)]


def compare(
    open_start: Callable[[], Start],
    arms: Sequence[Arm],
    seeds: int,
    equal: Literal["images", "macs"],
    settings: Settings,
    folder: Path,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Trains every arm with every seed and returns one row an arm, as in compare.json.

    A comparison that was interrupted goes on where it stopped; what is finished is not trained again. Judged
    is the last epoch, never the best, which would be chosen on the very images it is reported for.

    Args:
        equal: whether every arm sees the same images, or spends the same multiply-accumulates in training as
            the first; the first's are those of `settings`.

    Raises:
        TrainingError: where `folder` holds another comparison. Other ScalaErrors as `finetune`.
    """
    net, _ = open_start()
    what = {"arms": [arm.name for arm in arms], "equal": equal, "settings": str(settings)}
    claim(folder, what)
    first = training_gmacs(net, arms[0], settings)
    rows = []
    for arm in arms:
        gmacs = training_gmacs(net, arm, settings)
        epochs = settings.optimizer.epochs * (first / gmacs if equal == "macs" else 1)
        runs = []
        for seed in range(seeds):
            watch.note(f"{arm.name}, seed {settings.seed + seed} ({seed + 1} of {seeds})")
            chosen = replace(
                settings,
                method=arm.method,
                optimizer=replace(settings.optimizer, epochs=epochs),
                seed=settings.seed + seed,
            )
            runs.append(list(train(arm, open_start, chosen, folder / arm.name / str(chosen.seed), watch)))
        rows.append({"arm": arm.name, "epochs": round(epochs, 4), "gmacs_per_image": gmacs, **summary(runs)})
        write(folder, what, rows)
    return rows


def train(
    arm: Arm, open_start: Callable[[], Start], settings: Settings, place: Path, watch: Watcher
) -> Iterator[dict[str, Any]]:
    """The last rows of the runs that make up one arm with one seed: one, or for `separate` one a width."""
    points = open_start()[0].points
    alone = arm.method.method == "separate"
    for widths in [(point,) for point in points] if alone else [points]:
        run = Run(place / str(widths[0]) if alone else place)
        if run.holds_state():
            go_on(run, watch)
        else:
            net, record = arm.of(open_start())
            finetune(net.with_points(widths), record, settings, run, watch, force=True)
        yield json.loads((run.path / METRICS).read_text().splitlines()[-1])


def training_gmacs(net: SlimmableViT, arm: Arm, settings: Settings) -> float:
    """GMACs that one training image costs an arm: a backward pass counts as two forwards.

    The widths that a method draws are averaged over 1,000 steps.
    """
    forward = {point: cost(net.spec.at(point))["gmacs"] for point in net.points}
    taught = arm.method.teacher != "none" and METHODS[arm.method.method].taught
    teacher = forward.get(Point.of(1), cost(net.spec)["gmacs"]) if taught else 0.0
    if arm.method.method == "separate":
        return sum(3 * gmacs + teacher for gmacs in forward.values())
    method, drawn = METHODS[arm.method.method](net.points, arm.method), []
    images, targets = torch.zeros(1), torch.zeros(1, dtype=torch.long)

    def student(_: Tensor, point: Point) -> Tensor:
        drawn.append(forward[point])
        return torch.zeros(1, 2)

    for step in range(1000):
        for _ in method.passes(student, images, targets, None, Random(step)):
            pass
    return round(3 * sum(drawn) / 1000 + teacher, 4)


def summary(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation of top-1 over the seeds, for each width, and the minutes of a seed."""
    seeds = [{point["ratio"]: point["top1"] for row in rows for point in row["points"]} for rows in runs]
    points = [
        {
            "ratio": ratio,
            "top1": round(fmean(seed[ratio] for seed in seeds), 2),
            "spread": round(stdev([seed[ratio] for seed in seeds]), 2) if len(seeds) > 1 else None,
            "seeds": [seed[ratio] for seed in seeds],
        }
        for ratio in sorted(seeds[0])
    ]
    return {
        "points": points,
        "minutes": round(fmean(sum(row["minutes"] for row in rows) for rows in runs), 1),
    }


def claim(folder: Path, what: dict[str, Any]) -> None:
    """Takes a folder for a comparison, or goes on with the same one. Raises ScalaError for another's."""
    if (folder / RESULT).is_file():
        if json.loads((folder / RESULT).read_text())["of"] != what:
            raise TrainingError(f"{folder} holds another comparison.", "Give another place: --output DIR")
        return
    refuse_occupied(folder, False, set())
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, what, [])


def write(folder: Path, what: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The rows so far, as JSON and as CSV."""
    with whole_file(folder / RESULT) as file:
        file.write_text(json.dumps({"of": what, "arms": rows}, indent=2) + "\n")
    with whole_file(folder / "compare.csv") as file:
        write_csv(file, [columns(row) for row in rows])


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: a column for each width, mean and spread over the seeds."""
    tops = {
        f"{point['ratio']:g}": f"{point['top1']:.2f}"
        + ("" if point["spread"] is None else f" ± {point['spread']:.2f}")
        for point in row["points"]
    }
    return {"arm": row["arm"], **tops, "gmacs_per_image": row["gmacs_per_image"], "minutes": row["minutes"]}
