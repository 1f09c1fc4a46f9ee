"""A point: one member of the family that a slimmable ViT holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from scala_cli.errors import PointError


@dataclass(frozen=True, order=True)
class Point:
    """A width, as an exact share of the full model's channels.

    The ratio is a fraction, so that 0.1 read from a command line, a file and a float are one key.
    """

    ratio: Fraction

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise PointError(
                f"ratio {self.label} is not a width: it must be above 0 and at most 1.",
                "Give a share of the full width, for example --ratio 0.5",
            )

    @classmethod
    def of(cls, ratio: "str | float | Fraction | Point") -> "Point":
        """The point of "0.5", "1/3", 0.5 or a Fraction. Raises PointError for anything else.

        A float, as JSON holds it, is the simplest fraction next to it.
        """
        if isinstance(ratio, Point):
            return ratio
        try:
            if isinstance(ratio, str) and "e" in ratio.lower():  # as an exact fraction 1e9999999 never ends
                ratio = float(ratio)
            if isinstance(ratio, float):
                return cls(Fraction(ratio).limit_denominator(1 << 14))
            return cls(Fraction(str(ratio).strip()))
        except (ValueError, OverflowError, ZeroDivisionError):
            raise PointError(
                f"{str(ratio)!r} is not a ratio.",
                "Write 0.5 or 1/2; --ratio again for another, --ratios 0.25,0.5,1 for several at once.",
            ) from None

    @property
    def label(self) -> str:
        """Its name in metrics, files and rows: "0.25", or "1/3" where decimals do not end."""
        decimal = f"{float(self.ratio):.10g}"
        return decimal if Fraction(decimal) == self.ratio else str(self.ratio)

    @property
    def file_name(self) -> str:
        """The same where no slash may be: "1_3"."""
        return self.label.replace("/", "_")

    def __str__(self) -> str:
        return self.label


def parse_points(text: str) -> tuple[Point, ...]:
    """The points of "0.25,0.5,0.75,1", narrowest first."""
    points = {Point.of(part) for part in text.split(",") if part.strip()}
    if not points:
        raise PointError("no ratio given.", "Give at least one, for example --ratios 0.25,0.5,0.75,1")
    return tuple(sorted(points))


def find_point(wanted: "str | float | Fraction | Point", trained: Iterable[Point]) -> Point:
    """The trained point asked for.

    Widths between the trained ones collapse (Scala, Table 7: 1.6 % top-1 at 0.46875), so one that was
    not trained is refused with PointError, naming its nearest trained neighbours.
    """
    point, points = Point.of(wanted), sorted(trained)
    if point in points:
        return point
    near = sorted(points, key=lambda p: abs(p.ratio - point.ratio))[:2]
    raise PointError(
        f"ratio {point} was not trained; the nearest trained: {', '.join(p.label for p in sorted(near))}.",
        f"Try --ratio {near[0]}, or train it: scala finetune ... --ratios {point},...",
    )


def choose_points(wanted: Iterable[str] | None, trained: Sequence[Point]) -> list[Point]:
    """The trained points asked for, each once; all where none is."""
    return list(dict.fromkeys(find_point(ratio, trained) for ratio in wanted or trained))
