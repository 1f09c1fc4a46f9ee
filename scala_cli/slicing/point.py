"""A point: one member of the family that a slimmable ViT holds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import total_ordering
from typing import Any

from scala_cli.errors import PointError

NUMBER = r"[\d.]{1,40}(?:/\d{1,40}|e[+-]?\d{1,2})?"  # bounded: the exact value of 1e999999 fills the memory
LABEL = re.compile(rf"\s*(-?{NUMBER})(?:@(\d{{1,6}}))?(?:~({NUMBER}))?\s*", re.IGNORECASE)


@total_ordering
@dataclass(frozen=True)
class Point:
    """A width, the size of the image it takes, and how many of its tokens go on.

    Points are ordered by ratio, then size, then keep.

    Args:
        ratio: share of the full model's channels, exact, so that 0.1 read from a command line, a file and a
            float are one key.
        size: pixels a side; None is the size of the family.
        keep: share of the patch tokens that each token-dropping block keeps.
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
        """The point of "0.5", "1/3", "0.5@160", "0.5@160~0.7", of a float or a Fraction.

        Raises PointError for anything else. A float, as in JSON, becomes the simplest fraction close to it.
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
        """The point that the `columns` of a row name."""
        size = row.get("size")
        label = str(cls.of(row["ratio"])) + ("" if size is None else f"@{size}")
        return cls.of(f"{label}~{cls.of(float(row.get('keep', 1)))}")

    def columns(self) -> dict[str, Any]:
        """Returns the fields that name the point in rows and JSON: {"ratio"}, "size" and "keep" if set."""
        sized = {} if self.size is None else {"size": self.size}
        kept = {} if self.keep == 1 else {"keep": float(self.keep)}
        return {"ratio": float(self.ratio), **sized, **kept}

    @property
    def label(self) -> str:
        """Its name in metrics and files: "0.5", "0.5@160~0.7", "1/3" where decimals do not end."""
        size = "" if self.size is None else f"@{self.size}"
        return decimal(self.ratio) + size + ("" if self.keep == 1 else f"~{decimal(self.keep)}")

    @property
    def file_name(self) -> str:
        """The label with no slash in it: "1_3"."""
        return self.label.replace("/", "_")

    def __str__(self) -> str:
        return self.label


def decimal(share: Fraction) -> str:
    """A fraction as a person writes it: "0.25", or "1/3" where decimals do not end."""
    text = f"{float(share):.10g}"
    return text if Fraction(text) == share else str(share)


def parse_points(text: str) -> tuple[Point, ...]:
    """The points of "0.25,0.5,0.75,1", smallest first."""
    points = {Point.of(part) for part in text.split(",") if part.strip()}
    if not points:
        raise PointError(
            "no ratio given.",
            "Give at least one.",
            remedy="example",
            setting="ratios",
            value="0.25,0.5,0.75,1",
        )
    return tuple(sorted(points))


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


def find_point(wanted: "str | float | Fraction | Point", trained: Iterable[Point]) -> Point:
    """Returns the trained point that equals `wanted`.

    Accuracy collapses between trained widths (Scala, Table 7: 1.6 % top-1 at 0.46875), so a point that was
    not trained raises PointError, naming its nearest trained neighbours.
    """
    point, points = Point.of(wanted), sorted(trained)
    if point in points:
        return point
    near = sorted(points, key=lambda p: abs(p.ratio - point.ratio))[:2]
    raise PointError(
        f"ratio {point} was not trained; the nearest trained: {', '.join(p.label for p in sorted(near))}.",
        remedy="trained_ratio",
        trained=near[0],
        wanted=point,
    )


def choose_points(wanted: Iterable[str] | None, trained: Sequence[Point]) -> list[Point]:
    """Returns the wanted trained points, each once; all if none is named."""
    return list(dict.fromkeys(find_point(ratio, trained) for ratio in wanted or trained))
