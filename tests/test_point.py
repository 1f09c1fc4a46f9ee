"""Points: spelling, names, rows and order."""

from fractions import Fraction

import pytest

from scala_cli.errors import PointError
from scala_cli.slicing.point import Point, find_point, grid, parse_keeps, parse_points, ratios_of, single_axes


def test_one_width_is_one_key_however_it_is_written():
    written = ["0.1", ".1", "1/10", 0.1, Fraction(1, 10), "10e-2", 1 - 0.9]
    assert {Point.of(text) for text in written} == {Point(Fraction(1, 10))}


@pytest.mark.parametrize(
    ("text", "label"), [("0.50", "0.5"), ("1", "1"), ("1/3", "1/3"), (".46875", "0.46875")]
)
def test_label_reads_back(text, label):
    assert Point.of(text).label == label
    assert Point.of(label) == Point.of(text)


NO_POINTS = ["0", "1.5", "-0.5", "half", "", "1/0", "nan", "0.5@0", "0.5@", "0.5~2", "0.5~0", "@160"]
HUGE = ["1e9999999", "1e-99999999", "1e400", "9" * 5000]  # their exact values would fill the memory


@pytest.mark.parametrize("text", [*NO_POINTS, *HUGE])
def test_invalid_widths(text):
    with pytest.raises(PointError) as error:
        Point.of(text)
    assert error.value.hint or error.value.remedy


def test_parse_sorts_and_drops_repeats():
    assert [p.label for p in parse_points("1, 0.5,.50,0.25,")] == ["0.25", "0.5", "1"]
    with pytest.raises(PointError, match="no ratio"):
        parse_points(" ,")


def test_an_untrained_width_names_its_neighbours():
    trained = parse_points("0.25,0.5,0.75,1")
    assert find_point("1/2", trained).label == "0.5"
    with pytest.raises(PointError, match=r"0\.46875 was not trained; the nearest trained: 0\.25, 0\.5"):
        find_point(0.46875, trained)


FORMS = {
    "0.5": Point(Fraction(1, 2)),
    "0.5@160": Point(Fraction(1, 2), 160),
    "1/3~0.7": Point(Fraction(1, 3), keep=Fraction(7, 10)),
    "0.5@160~0.7": Point(Fraction(1, 2), 160, Fraction(7, 10)),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_point_has_one_name_and_one_row(text):
    point = FORMS[text]
    assert Point.of(text) == point and point.label == text
    assert Point.of_row({"model": "vit", **point.columns(), "top1": 71.4}) == point
    assert "/" not in point.file_name


def test_a_row_names_size_and_keep_only_where_they_are_set():
    assert Point.of("0.5").columns() == {"ratio": 0.5}
    assert Point.of("0.5@160").columns() == {"ratio": 0.5, "size": 160}
    assert Point.of("0.5@160~0.7").columns() == {"ratio": 0.5, "size": 160, "keep": 0.7}


def test_points_are_ordered_by_ratio_then_size_then_keep():
    ordered = ["0.25@224", "0.5@128~0.5", "0.5@128", "0.5@224~0.7", "0.5@224", "1@128"]
    assert [str(point) for point in parse_points(",".join(reversed(ordered)))] == ordered
    assert [str(ratio) for ratio in ratios_of(parse_points("1,0.25,0.5"))] == ["1/4", "1/2", "1"]


def test_a_family_of_widths_takes_no_other_points():
    """Otherwise a size would be dropped silently."""
    for text in ("0.5@160", "0.5~0.7"):
        with pytest.raises(PointError, match=f"{text} is more than a width"):
            ratios_of(parse_points(f"{text},1"))


@pytest.mark.parametrize(
    "row", [{"size": "x"}, {"size": -3}, {"size": 160.5}, {"ratio": "0.5@160", "size": 3}]
)
def test_a_row_that_names_no_point(row):
    with pytest.raises(PointError):
        Point.of_row({"ratio": 0.5, **row})


def test_the_single_axes_of_a_grid_are_its_points_that_are_largest_on_the_others():
    points = grid([Point.of(ratio) for ratio in ("0.5", "1")], (16, 32), parse_keeps("0.5,1"))
    labels = {axis: [str(point) for point in along] for axis, along in single_axes(points).items()}
    assert labels == {
        "width": ["0.5@32", "1@32"],
        "size": ["1@16", "1@32"],
        "tokens": ["1@32~0.5", "1@32"],
    }
    assert single_axes(parse_points("0.25,0.5,1")) == {}, "widths alone are no grid"
