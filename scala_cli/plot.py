"""Draws pictures with matplotlib, an optional dependency."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from scala_cli.cost import pareto
from scala_cli.errors import ScalaError
from scala_cli.files import refuse_unwritable, whole_file
from scala_cli.report import Rows
from scala_cli.slicing.point import Point, single_axes
from scala_cli.tasks.base import Task, main_column

INSTALL = "pip install 'scala-vit[plot]'"
MISSING = f"no picture without matplotlib: {INSTALL}"
SUFFIXES = (".svg", ".png", ".pdf")
TOOLTIP = "point-"
"""Prefix of the ids of invisible markers, whose labels become tooltips in an SVG."""


def can_draw() -> bool:
    """Returns whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def refuse_picture(file: Path) -> None:
    """Raises ScalaError unless a picture can be drawn to this file."""
    if not can_draw():
        raise ScalaError("pictures need matplotlib, which is not installed.", INSTALL)
    if file.suffix not in SUFFIXES:
        raise ScalaError(f"{file} is not a picture file.", f"Let its name end in {', '.join(SUFFIXES)}.")
    refuse_unwritable(file)


def new_axes() -> tuple[Any, Any]:
    """Returns an empty figure and its axes."""

    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "scala"  # the same rows give the same file
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, file: Path) -> None:
    """Writes a figure, the same bytes for the same figure."""
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix)
    with whole_file(file) as target:
        figure.savefig(target, format=file.suffix[1:], dpi=200, metadata=metadata)


def as_svg(figure: Any) -> str:
    """Returns the picture as an <svg> element, in which the label of each `TOOLTIP` marker is a tooltip."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for marker in figure.findobj(lambda artist: (artist.get_gid() or "").startswith(TOOLTIP)):
        group = f'<g id="{marker.get_gid()}">'
        svg = svg.replace(group, f"{group}<title>{escape(marker.get_label()[1:])}</title>", 1)
    return svg


def arms_picture(arms: Rows, task: Task) -> Any:
    """Draws the task's first metric of every width against its GMACs: a line per arm, spreads as error bars.

    Args:
        arms: the "arms" of compare.json.
    """
    figure, axes = new_axes()
    main = main_column(task)
    for arm in arms:
        points = arm["points"]
        axes.errorbar(
            [point["gmacs"] for point in points],
            [point[main] for point in points],
            [point["spread"] or 0 for point in points],
            marker="o",
            markersize=4,
            capsize=3,
            label=arm["arm"],
        )
    axes.set_xscale("log")
    ticks = {point["gmacs"]: f"{point['gmacs']:.3g}\n({Point.of_row(point)})" for point in arms[0]["points"]}
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.minorticks_off()
    axes.set_xlabel("GMACs of one image (width)")
    axes.set_ylabel(task.columns[main])
    axes.legend(fontsize="small")
    return figure


def bench_picture(rows: Rows, task: Task) -> Any:
    """Draws the task's first metric, or else GMACs, of every point against its latency.

    The metric is drawn if it is known for all points, with the front of those that no other beats. For a grid
    the fronts of its single axes are drawn too. A compared model without a metric is a vertical line. Points
    of the first runtime are labelled, of a grid only those on the front; in an SVG every point has a tooltip.
    """
    figure, axes = new_axes()
    first, main = rows[0]["runtime"], main_column(task)
    known = all(row[main] is not None for row in rows if row["ratio"] is not None and row["runtime"] == first)
    column, name = (main, task.columns[main]) if known else ("gmacs", "GMACs of one image")
    drawn = [row for row in rows if row[column] is not None]
    places = [(row["latency_ms"], row[column]) for row in drawn]
    for runtime in dict.fromkeys(row["runtime"] for row in drawn):
        some = [place for row, place in zip(drawn, places, strict=True) if row["runtime"] == runtime]
        axes.plot(*zip(*some, strict=True), "o", label=runtime, alpha=0.7)
    front = [places[number] for number in pareto(places)] if known else []
    single = single_axes(Point.of_row(row) for row in drawn if row["ratio"] is not None) if known else {}
    fronts = {"front": front} if front else {}
    for axis, points in single.items():
        some = [p for row, p in zip(drawn, places, strict=True) if is_one_of(row, points, first)]
        fronts[f"front of {axis} alone"] = [some[number] for number in pareto(some)]
    for label, line in fronts.items():
        last = (max(latency for latency, _ in places), line[-1][1])
        style = {"color": "grey", "linestyle": "--"} if line is front else {"linestyle": ":"}
        axes.step(*zip(*line, last, strict=True), where="post", label=label, **style)
    for number, (row, place) in enumerate(zip(drawn, places, strict=True)):
        told = f"{label_of(row)}, {row['runtime']}: {place[0]:.4g} ms, {place[1]:.4g} ({name})"
        axes.plot(*place, "o", alpha=0, markersize=10, gid=f"{TOOLTIP}{number}", label=f"_{told}")
        if place in front or (row["runtime"] == first and not single):
            axes.annotate(label_of(row), place, xytext=(5, -10), textcoords="offset points", fontsize="small")
    for row in rows:
        if row not in drawn and row["ratio"] is None and row["runtime"] == first:
            axes.axvline(row["latency_ms"], color="grey", linestyle=":")
            place = (row["latency_ms"], 0.02)
            axes.annotate(
                row["model"], place, xycoords=("data", "axes fraction"), rotation=90, fontsize="small"
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize="small")
    axes.margins(x=0.15)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel(name)
    axes.legend(fontsize="small")
    return figure


def label_of(row: Mapping[str, Any]) -> str:
    """Returns the label of a row's point, or the name of a compared model."""
    return str(row["model"]) if row["ratio"] is None else Point.of_row(row).label


def is_one_of(row: Mapping[str, Any], points: Sequence[Point], runtime: str) -> bool:
    """Returns whether a row is one of these points, in this runtime."""
    return row["runtime"] == runtime and row["ratio"] is not None and Point.of_row(row) in points


def stages_picture(pictures: Sequence[Any], titles: Sequence[str]) -> Any:
    """Draws pictures side by side.

    Args:
        pictures: (H, W, 3) from 0 to 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(pictures), 2.9), layout="constrained")
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True), 1):
        axes = figure.add_subplot(1, len(pictures), number)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
    return figure


def cascade_picture(sweep: Rows, points: Rows) -> Any:
    """Draws top-1 of a cascade against its mean GMACs, by threshold, beside single points.

    Args:
        sweep: {"threshold", "top1", "gmacs"}
        points: {"ratio", "top1", "gmacs"}
    """
    figure, axes = new_axes()
    for rows, label in ((sweep, "cascade, threshold"), (points, "one point")):
        line = "-" if rows is sweep else ""
        axes.plot([r["gmacs"] for r in rows], [r["top1"] for r in rows], "o", linestyle=line, label=label)
        for row in rows:
            axes.annotate(
                f"{row['threshold']:g}" if rows is sweep else label_of(row),
                (row["gmacs"], row["top1"]),
                xytext=(4, 6 if rows is sweep else -12),
                textcoords="offset points",
                fontsize="x-small",
            )
    axes.set_xlabel("GMACs of one image, mean")
    axes.set_ylabel("top-1, %")
    axes.legend(fontsize="small")
    return figure
