"""Points: the members of a slimmable ViT's family, with a width, an image size and a share of tokens."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import total_ordering
from typing import Any

from scala_cli.errors import PointError

NUMBER = r"[\d.]{1,40}(?:/\d{1,40}|e[+-]?\d{1,2})?"  # bounded, as 1e999999 as an exact Fraction fills memory
LABEL = re.compile(rf"\s*(-?{NUMBER})(?:@(\d{{1,6}}))?(?:~({NUMBER}))?\s*", re.IGNORECASE)


@total_ordering
@dataclass(frozen=True)
class Point:
    """A width, an image size and a share of tokens.

    Points are ordered by ratio, then size, then keep.

    Args:
        ratio: share of the full model's channels; exact, so that 0.1 from a command line, a file or a float
            is the same key.
        size: side of the image in pixels; None means the family's size.
        keep: share of the tokens that each dropping block passes on.
    """

    ratio: Fraction
    size: int | None = None
    keep: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise PointError(
                f"ratio {decimal(self.ratio)} is not a width: it must be above 0 and at most 1.",
                "Give a share of the full width.",
                remedy="example",
                setting="ratio",
                value="0.5",
            )
        if not 0 < self.keep <= 1 or self.size == 0:
            raise PointError(
                f"{self.label} is no point: the share of tokens must be above 0 and at most 1, "
                "the size at least 1.",
                remedy="example",
                setting="ratio",
                value="0.5@160~0.7",
            )

    def __lt__(self, other: "Point") -> bool:
        return (self.ratio, self.size or 0, self.keep) < (other.ratio, other.size or 0, other.keep)

    @classmethod
    def of(cls, point: "str | float | Fraction | Point") -> "Point":
        """Returns the point of "0.5", "1/3", "0.5@160", "0.5@160~0.7", a float or a Fraction.

        A float, as in JSON, becomes the simplest fraction close to it. Raises PointError for anything else.
        """
        if isinstance(point, Point):
            return point
        try:
            if isinstance(point, float):
                return cls(Fraction(point).limit_denominator(1 << 14))
            if isinstance(point, Fraction):
                return cls(point)
            ratio, size, keep = LABEL.fullmatch(str(point)).groups()  # type: ignore[union-attr]
            return cls(Fraction(ratio), int(size) if size else None, Fraction(keep or 1))
        except (AttributeError, ValueError, OverflowError, ZeroDivisionError):
            raise PointError(
                f"{str(point)[:40]!r} is not a ratio.", "Write 0.5 or 1/2.", remedy="several_ratios"
            ) from None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Point":
        """Returns the point of a row with the fields of `columns`."""
        size = row.get("size")
        label = str(cls.of(row["ratio"])) + ("" if size is None else f"@{size}")
        return cls.of(f"{label}~{cls.of(float(row.get('keep', 1)))}")

    def columns(self) -> dict[str, Any]:
        """Returns the point's fields in rows and JSON: {"ratio"}, with "size" and "keep" if set."""
        sized = {} if self.size is None else {"size": self.size}
        kept = {} if self.keep == 1 else {"keep": float(self.keep)}
        return {"ratio": float(self.ratio), **sized, **kept}

    @property
    def label(self) -> str:
        """The point's name in metrics and files: "0.5", "0.5@160~0.7", or "1/3" if decimals do not end."""
        size = "" if self.size is None else f"@{self.size}"
        return decimal(self.ratio) + size + ("" if self.keep == 1 else f"~{decimal(self.keep)}")

    @property
    def file_name(self) -> str:
        """The label without slashes: "1_3"."""
        return self.label.replace("/", "_")

    def __str__(self) -> str:
        return self.label


def decimal(share: Fraction) -> str:
    """Formats a fraction: "0.25", or "1/3" if decimals do not end."""
    text = f"{float(share):.10g}"
    return text if Fraction(text) == share else str(share)


def parse_points(text: str) -> tuple[Point, ...]:
    """Returns the points of "0.25,0.5,0.75,1", smallest first. Raises PointError if there are none."""
    points = {Point.of(part) for part in parts_of(text)}
    if not points:
        raise PointError(
            "no ratio given.",
            "Give at least one.",
            remedy="example",
            setting="ratios",
            value="0.25,0.5,0.75,1",
        )
    return tuple(sorted(points))


def grid(
    points: Iterable[Point], sizes: Sequence[int] = (), keeps: Sequence[Fraction] = ()
) -> tuple[Point, ...]:
    """Returns every point at every size and with every share of tokens, smallest first.

    Without `sizes` or `keeps` points keep their own. Raises PointError for a point that has its own size
    although `sizes` are given, or its own share although `keeps` are.
    """
    points = tuple(points)
    for point in points:
        if (sizes and point.size) or (keeps and point.keep != 1):
            raise PointError(
                f"{point} has a size or a share of tokens of its own, beside those of the grid.",
                "Give the width alone, or leave out the grid.",
            )
    made = [replace(p, size=size) for p in points for size in sizes] if sizes else points
    return tuple(sorted({replace(p, keep=keep) for p in made for keep in keeps} if keeps else {*made}))


def sized(points: Iterable[Point], own: int | None) -> tuple[Point, ...]:
    """Returns a family's points, all with a size; without sizes if all have the family's own.

    Args:
        own: the family's own size, of points without one.
    """
    points = [replace(point, size=point.size or own) for point in points]
    plain = all(point.size == own for point in points)
    return tuple(sorted({replace(point, size=None) if plain else point for point in points}))


def parse_sizes(text: str) -> tuple[int, ...]:
    """Returns the sizes of "128,160,224", smallest first. Raises PointError for anything else."""
    try:
        return tuple(sorted({Point.of(f"1@{part}").size or 0 for part in parts_of(text)}))
    except PointError:
        raise PointError(
            f"{text[:40]!r} are no sizes in pixels.",
            remedy="example",
            setting="sizes",
            value="128,160,192,224",
        ) from None


def parse_keeps(text: str) -> tuple[Fraction, ...]:
    """Returns the shares of "0.5,0.7,1". Raises PointError for anything else, and for 0."""
    try:
        return tuple(sorted({Point.of(f"1~{part}").keep for part in parts_of(text)}))
    except PointError:
        raise PointError(
            f"{text[:40]!r} are no shares of tokens, above 0 and at most 1.",
            remedy="example",
            setting="keeps",
            value="0.5,0.7,1",
        ) from None


def parts_of(text: str) -> list[str]:
    """Splits a comma-separated list, dropping blanks and empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def widths_of(points: Iterable[Point]) -> tuple[Fraction, ...]:
    """Returns the widths of points, narrowest first."""
    return tuple(sorted({point.ratio for point in points}))


def single_axes(points: Iterable[Point]) -> dict[str, tuple[Point, ...]]:
    """Returns the points of a grid that are largest on all axes but one, by that axis; smallest first.

    The axes are "width", "size" and "tokens". Empty unless points differ on two axes or more.
    """
    points = sorted(points)
    values = [(point.ratio, point.size or 0, point.keep) for point in points]
    largest = [max(axis) for axis in zip(*values, strict=True)]
    found = {}
    for number, name in enumerate(("width", "size", "tokens")):
        rest = [other for other in range(len(largest)) if other != number]
        along = [p for p, v in zip(points, values, strict=True) if all(v[r] == largest[r] for r in rest)]
        if len(along) > 1:
            found[name] = tuple(along)
    return found if len(found) > 1 else {}


def ratios_of(points: Iterable[Point]) -> tuple[Fraction, ...]:
    """Returns the widths of points without size or keep, narrowest first. Raises PointError for others."""
    points = set(points)
    odd = [point for point in points if point != Point(point.ratio)]
    if odd:
        raise PointError(
            f"{min(odd)} is more than a width; a family is made of widths.",
            f"Give the width alone: {decimal(min(odd).ratio)}.",
        )
    return tuple(sorted(point.ratio for point in points))


def find_point(
    wanted: "str | float | Fraction | Point", trained: Iterable[Point], own: int | None = None
) -> Point:
    """Returns the trained point that equals `wanted`.

    Accuracy collapses between trained widths (Scala, Table 7: 1.6 % top-1 at 0.46875), so a point that was
    not trained raises PointError, naming its nearest trained neighbours.

    Args:
        own: the family's own size, of points without one.
    """
    point, points = Point.of(wanted), sorted(trained)
    if any(each.size for each in points):
        point = replace(point, size=point.size or own)
    elif point.size == own:
        point = replace(point, size=None)
    if point in points:
        return point
    kind = "ratio" if point == Point(point.ratio) else "point"
    near = sorted(points, key=lambda p: distance(p, point))[:2]
    raise PointError(
        f"{kind} {point} was not trained; the nearest trained: {', '.join(p.label for p in sorted(near))}.",
        remedy="trained_ratio",
        trained=near[0],
        wanted=point,
    )


def distance(one: Point, other: Point) -> tuple[float, float, float]:
    """Returns the distance of two points, compared by width, then size, then share of tokens."""
    sizes = abs((one.size or 0) - (other.size or 0))
    return float(abs(one.ratio - other.ratio)), float(sizes), float(abs(one.keep - other.keep))
