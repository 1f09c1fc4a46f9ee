"""Writes rows as CSV, Markdown and HTML."""

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scala_cli.files import whole_file
from scala_cli.slicing.point import Point

Rows = Sequence[Mapping[str, Any]]

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ white-space: nowrap; padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd; }}
div {{ overflow-x: auto; }} svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<p>{conditions}</p>
<div>{table}</div>
{picture}
</html>
"""


def even(rows: Rows) -> list[dict[str, Any]]:
    """Returns the rows with the same columns in each; a missing "keep" becomes 1, any other value None."""
    columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
    return [
        {column: row.get(column, 1.0 if column == "keep" else None) for column in columns} for row in rows
    ]


def markdown(rows: Rows) -> str:
    """Returns rows as a table of Markdown."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([cell(*item) for item in row.items()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(column: str, value: Any) -> str:
    """Formats a cell of a table; it is empty if the value is not known."""
    if value is None:
        return ""
    if column == "ratio":
        return Point.of(value).label
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(file: Path, rows: Rows) -> None:
    """Writes rows as CSV, with every column that any of them has."""
    with file.open("w", newline="", encoding="utf-8") as handle:  # in place, so that it may be a link
        writer = csv.DictWriter(handle, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_page(file: Path, title: str, conditions: Mapping[str, Any], rows: Rows, svg: str) -> None:
    """Writes one HTML page that needs no other file.

    Args:
        conditions: what the figures depend on, by name.
        svg: the picture, an <svg> element.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell(*item))}</td>" for item in row.items()) + "</tr>\n"
        for row in rows
    )
    page = PAGE.format(
        title=escape(title),
        conditions=escape(", ".join(f"{name} {cell(name, value)}" for name, value in conditions.items())),
        table=f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>",
        picture=svg,
    )
    with whole_file(file) as target:
        target.write_text(page, encoding="utf-8")
