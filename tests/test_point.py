from fractions import Fraction

import pytest

from scala_cli.errors import PointError
from scala_cli.slicing.point import Point, find_point, parse_points


def test_one_width_is_one_key_however_it_is_written():
    written = ["0.1", ".1", "1/10", 0.1, Fraction(1, 10), "10e-2", 1 - 0.9]
    assert {Point.of(text) for text in written} == {Point(Fraction(1, 10))}


@pytest.mark.parametrize(
    ("text", "label"), [("0.50", "0.5"), ("1", "1"), ("1/3", "1/3"), (".46875", "0.46875")]
)
def test_label_reads_back(text, label):
    assert Point.of(text).label == label
    assert Point.of(label) == Point.of(text)


@pytest.mark.parametrize(
    "text", ["0", "1.5", "-0.5", "half", "", "1/0", "nan", "1e9999999", "1E-9999999", "1e400", "e"]
)
def test_no_width(text):
    with pytest.raises(PointError) as error:
        Point.of(text)
    assert error.value.hint


def test_parse_sorts_and_drops_repeats():
    assert [p.label for p in parse_points("1, 0.5,.50,0.25,")] == ["0.25", "0.5", "1"]
    with pytest.raises(PointError, match="no ratio"):
        parse_points(" ,")


def test_an_untrained_width_names_its_neighbours():
    trained = parse_points("0.25,0.5,0.75,1")
    assert find_point("1/2", trained).label == "0.5"
    with pytest.raises(PointError, match=r"0\.46875 was not trained; the nearest trained: 0\.25, 0\.5"):
        find_point(0.46875, trained)
