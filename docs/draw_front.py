"""Draws accuracy against work for a grid of points and for a family of widths, means over runs.

python docs/draw_front.py GRID_RUN,GRID_RUN,... WIDTHS_RUN,... -o front.svg
"""

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from scala_cli.cost import macs, pareto
from scala_cli.models.checkpoint import load_with_record
from scala_cli.plot import new_axes, save


def points_of(runs: str) -> list[tuple[float, float, str]]:
    """Returns (GMACs, mean top-1, label) of each point."""
    opened = [load_with_record(Path(run) / "last") for run in runs.split(",")]
    net = opened[0][0]
    return [
        (macs(net.spec_at(p)) / 1e9, fmean(record.measured(p, "top1") for _, record in opened), p.label)
        for p in net.points
    ]


def main(grid: str, widths: str, output: Annotated[Path, typer.Option("--output", "-o")]):
    figure, axes = new_axes()
    for runs, name, marker in ((grid, "widths, sizes and tokens", "o"), (widths, "widths", "s")):
        found = points_of(runs)
        front = [found[number] for number in pareto([(work, top1) for work, top1, _ in found])]
        (dots,) = axes.plot([p[0] for p in found], [p[1] for p in found], marker, markersize=4, alpha=0.5)
        line = [(work, top1) for work, top1, _ in front]
        axes.step(*zip(*line, strict=True), where="post", color=dots.get_color(), label=f"front: {name}")
        labelled = 0.0
        for work, top1, label in front if runs is grid else ():
            if work > 1.25 * labelled:  # labels of close points would cover each other
                place = {"xytext": (4, -11), "textcoords": "offset points", "fontsize": "x-small"}
                axes.annotate(label, (work, top1), **place)
                labelled = work
    axes.margins(x=0.1)
    axes.set_xscale("log")
    axes.set_xlabel("GMACs of one image")
    axes.set_ylabel("top-1, %")
    axes.legend(fontsize="small")
    save(figure, output)


if __name__ == "__main__":
    typer.run(main)
