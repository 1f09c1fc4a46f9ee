"""Pictures, by matplotlib, an optional dependency."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scala_cli.files import whole_file

MISSING = "no picture without matplotlib: pip install 'scala-vit[plot]'"


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw_arms(arms: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Top-1 of every width against its GMACs, a line for each arm of a comparison, spreads as bars.

    Args:
        arms: rows of compare.json.
        file: .svg or .png
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm in arms:
        points = arm["points"]
        axes.errorbar(
            [point["gmacs"] for point in points],
            [point["top1"] for point in points],
            [point["spread"] or 0 for point in points],
            marker="o",
            markersize=4,
            capsize=3,
            label=arm["arm"],
        )
    axes.set_xscale("log")
    ticks = {point["gmacs"]: f"{point['gmacs']:.3g}\n({point['ratio']:g})" for point in arms[0]["points"]}
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.minorticks_off()
    axes.set_xlabel("GMACs of one image (width)")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with whole_file(file) as target:
        figure.savefig(target, format=file.suffix[1:])
