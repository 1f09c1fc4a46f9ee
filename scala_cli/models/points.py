"""Adds points to a family: a grid of sizes and shares of tokens to train, or points that need no training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scala_cli.errors import PointError
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import Changes, is_checkpoint, open_slimmable
from scala_cli.settings import GridSettings, TokenSettings
from scala_cli.slicing.point import Point, parse_keeps, parse_points, parse_sizes
from scala_cli.slicing.point import grid as points_of_grid
from scala_cli.slicing.tokens import TokenRule, parse_blocks
from scala_cli.watch import QUIET, Watcher


def open_grid(
    name: str, ratios: str | None, grid: GridSettings, changes: Changes | None = None, **how: Any
) -> tuple[SlimmableViT, Record]:
    """Opens a model to train at every size and share of tokens of a grid, as `open_slimmable` and `in_grid`.

    A MODEL that is not a checkpoint takes images of the largest size, unless `changes` sets one.
    """
    sizes, changes = parse_sizes(grid.sizes or ""), changes or Changes()
    if is_checkpoint(name):
        # with its own points, as with others it would lose the position embeddings of its sizes
        net, record = open_slimmable(name, None, changes, **how)
        return in_grid(net, grid, parse_points(ratios) if ratios else ()), record
    if sizes and changes.img_size is None:
        changes = replace(changes, img_size=sizes[-1])
    net, record = open_slimmable(name, ratios, changes, **how)
    return in_grid(net, grid), record


def in_grid(net: SlimmableViT, grid: GridSettings, widths: Sequence[Point] = ()) -> SlimmableViT:
    """Returns the family with every size and share of tokens of a grid, to be trained.

    Args:
        widths: by default the points of the family.

    Raises PointError for invalid grid settings, and for points that the model cannot have.
    """
    spec = net.spec
    blocks = parse_blocks(grid.drop_blocks) if grid.drop_blocks else spec.tokens.blocks
    spec = replace(spec, tokens=TokenRule(grid.tokens or spec.tokens.kind, blocks))
    spec = replace(spec, resize=grid.resize or spec.resize)
    points = points_of_grid(
        widths or net.points, parse_sizes(grid.sizes or ""), parse_keeps(grid.keeps or "")
    )
    if (grid.tokens or grid.drop_blocks) and all(point.keep == 1 for point in points):
        raise PointError(
            "no point passes on fewer tokens, so there is nothing to merge or drop.",
            remedy="example",
            setting="keeps",
            value="0.5,1",
        )
    return net if (spec, points) == (net.spec, net.points) else net.like(spec=spec).with_points(points)


def with_untrained(
    net: SlimmableViT,
    record: Record,
    wanted: Sequence[str] | None,
    settings: TokenSettings,
    watch: Watcher = QUIET,
) -> tuple[SlimmableViT, list[Point]]:
    """Returns the family, with those wanted points added that need no training; and the wanted points.

    These are shares of tokens if the family was not trained to reduce tokens (merged, unless `settings` says
    otherwise), and other sizes if the widths were not trained (the position embedding is resampled).

    Args:
        wanted: None means all points of the family.

    Raises PointError for a point that needs training.
    """
    asked = [Point.of(text) for text in wanted or ()]
    reduced = any(point.keep < 1 for point in net.points)
    if reduced and settings.given():
        trained = "this family was trained to pass on fewer tokens, by its own rule."
        if settings.tokens:
            raise PointError(trained, remedy="leave_out", setting="tokens")
        raise PointError(trained, remedy="leave_out", setting="drop-blocks")
    more = []
    for point in asked:
        start = point if reduced else replace(point, keep=Point.keep)
        if record.method is None:
            start = replace(start, size=None)
        net.find(start)
        more += [point] if start != point else []
    if more:
        blocks = parse_blocks(settings.drop_blocks) if settings.drop_blocks else ()
        rule = net.spec.tokens if reduced else TokenRule(settings.tokens or "merge", blocks)
        net = net.like(spec=replace(net.spec, tokens=rule)).with_points([*net.points, *more])
        if any(point.keep < 1 for point in more):
            what = "merged" if rule.kind == "merge" else "dropped"
            watch.note(f"tokens are {what} without training.")
    return net, list(dict.fromkeys(map(net.find, asked))) or [*net.points]
