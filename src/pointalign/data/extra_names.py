"""What the extra models are: the reviewed tables of nouns and labels, which are data and not code."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from pathlib import Path

from pointalign.data.household import ASSETS, household_classes
from pointalign.errors import DataError

EXTRA_ASSETS = ASSETS / "extra"
NAMES_FILE = EXTRA_ASSETS / "names.csv"
HOMEDECOR_FILE = EXTRA_ASSETS / "homedecor.csv"


@dataclass(frozen=True)
class Naming:
    """What an object is.

    Attributes:
        noun: what it is in plain English, with its article.
        label: one of household's classes where it is certainly that, else None.
        metres: whether its model is in metres.
    """

    noun: str
    label: str | None
    metres: bool


@dataclass(frozen=True)
class HomedecorRow:
    """One homedecor object: its mesh, the mesh's axis that points up, what each of its groups wears, and what it is.

    A tile is an image's name, `name*#rrggbb` for an image times a colour, `#rrggbb`, or empty for a group left out.
    """

    id: str
    mesh: str
    up: str
    tiles: tuple[str, ...]
    naming: Naming


def find_name(source: str, path: str) -> Naming | None:
    """What the object of a source at a path is; None when no row of the table names it.

    The last row whose pattern fits the path decides; one without a noun leaves the object out.
    """
    found = None
    for row_source, pattern, naming in _name_rules():
        if row_source == source and pattern.fullmatch(path):
            found = naming
    return found


def read_homedecor(path: str | Path = HOMEDECOR_FILE) -> list[HomedecorRow]:
    """The table of homedecor objects, in its own order.

    Raises:
        DataError: when the file is missing, lacks a column, or names a class that is not household's.
    """
    return [
        HomedecorRow(row["id"], row["mesh"], row["up"], tuple(row["tiles"].split("|")), _naming(row, Path(path)))
        for row in _rows(Path(path), ("id", "mesh", "up", "tiles", "noun", "label", "metres"))
    ]


@cache
def _name_rules(path: Path = NAMES_FILE) -> list[tuple[str, re.Pattern[str], Naming | None]]:
    rows = _rows(path, ("source", "pattern", "noun", "label", "metres"))
    return [
        (row["source"], re.compile(translate(row["pattern"])), _naming(row, path) if row["noun"] else None)
        for row in rows
    ]


def _naming(row: dict[str, str], path: Path) -> Naming:
    if row["label"] and row["label"] not in _classes():
        raise DataError(f"{path}: {row['label']!r} is none of household's classes; leave it empty or use one of them")
    return Naming(row["noun"], row["label"] or None, row["metres"] == "yes")


@cache
def _classes() -> frozenset[str]:
    return frozenset(household_classes())


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"no table of names at {path}; check the path")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = set(columns) - set(reader.fieldnames or ())
        if absent:
            raise DataError(f"{path} lacks the columns {', '.join(sorted(absent))}; its header is {','.join(columns)}")
        return list(reader)
