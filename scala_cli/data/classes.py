"""Class names: spelling, order, and whether a model's match the data's."""

import re
from collections.abc import Iterable, Sequence
from unicodedata import normalize


def spelled(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names in Unicode NFC, with composed accents; macOS decomposes the accents of file names."""
    return tuple(normalize("NFC", name) for name in names)


def natural_order(name: str) -> tuple[list[int | str], str]:
    """Returns a key that sorts names as timm does, 2 before 10 and upper case beside lower case.

    Names that timm sorts as equal (Cat and cat, 1 and 01) are sorted by their characters, so the order is the
    same in every process and on every machine.
    """
    parts = re.split(r"(\d+)", name.lower())  # every second part is digits
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Returns whether both hold the same names, each once, in any order."""
    return len({*names}) == len(names) and sorted(spelled(names)) == sorted(spelled(others))


def class_misfit(data: Sequence[str], num_classes: int, names: Sequence[str] | None) -> str:
    """Returns why a model's classes do not match the data's; empty if they do, in any order."""
    if not num_classes:
        return "the model has no classes, it gives features"
    if len(data) != num_classes:
        return f"the model knows {num_classes} classes, the data has {len(data)}"
    unknown = sorted({*spelled(data)} - {*spelled(names)}, key=natural_order) if names else []
    if unknown:
        return f"the data has a class {unknown[0]!r} that the model does not know"
    if names and spelled(names) != spelled(data) and not same_classes(names, data):
        return "the model has several classes of the same name"
    return ""
