"""Clouds written as text: .xyz .txt .csv .pts .asc, one point a line, with or without a header."""

from __future__ import annotations

from collections.abc import Sequence

from pointalign.data.files.columns import XYZ, Column, Table, is_used, plain_name
from pointalign.data.files.numbers import COMMENTS, read_numbers
from pointalign.data.files.source import MAX_LINE_BYTES, Source
from pointalign.errors import DataError

MAX_COLUMNS = 256
# What the columns of a .pts file are, whose first line is the number of its points.
COUNTED_COLUMNS = {
    4: ("x", "y", "z", "intensity"),
    6: ("x", "y", "z", "red", "green", "blue"),
    7: ("x", "y", "z", "intensity", "red", "green", "blue"),
}


def read_text(source: Source, names: Sequence[str] | None = None) -> Table:
    """Open a cloud that is written as text.

    Numbers are separated by commas, semicolons (then a decimal comma is understood), tabs or blanks. The header may be the
    first line or a comment just before the numbers; a line that is one whole number, before the numbers or between them and
    the header, counts the points.

    Args:
        source: the file.
        names: what the user calls the columns; what the file calls them is then not looked at.

    Raises:
        DataError: when there is no line of numbers, or while the rows are read, when one cannot be.
    """
    first, comment = _next_line(source)
    words, header = _words(first), None
    counted = _is_count(words)
    start = 0
    if counted:
        start = source.file.tell()
        first, below = _next_line(source)
        header = next((told for told in map(_words, (below, comment)) if _fits(told, first)), None)
    elif not _are_numbers(words):
        header, start = words, source.file.tell()
        first, _ = _next_line(source)
        if len(words) > 1 and _is_count(_words(first)):
            start = source.file.tell()
            first, _ = _next_line(source)
    elif len(told := _words(comment)) == len(words):
        header = told
    delimiter = _delimiter(first)
    width = len(_split(first, delimiter))
    if width > MAX_COLUMNS:
        raise DataError(f"{source.name} has {width} columns; at most {MAX_COLUMNS} are read")
    if header is not None and len(header) != width:
        raise DataError(f"{source.name} names {len(header)} columns and has {width}; mend its first line")
    if names is not None and len(names) != width:
        raise DataError(f"{source.name} has {width} columns and {len(names)} names were given; name each")
    used = names or header or (COUNTED_COLUMNS.get(width) if counted else None) or [""] * width
    kept = list(range(width))
    if _hold_coordinates(used):  # else all are named in what is said of it
        kept = [at for at, name in enumerate(used) if is_used(name)]
    source.file.seek(start)
    return Table(tuple(Column(used[at]) for at in kept), read_numbers(source, width, kept, delimiter))


def _next_line(source: Source) -> tuple[str, str]:
    """The next line that says something, and the comment above it."""
    comment = ""
    while octets := source.file.readline(MAX_LINE_BYTES):
        if len(octets) == MAX_LINE_BYTES or b"\0" in octets:
            raise DataError(f"{source.name} is not a text of numbers; give its format")
        line = octets.decode("utf-8", errors="replace").lstrip("\ufeff").strip()
        if line.encode().startswith(COMMENTS):
            comment = line.lstrip("#/%").strip()
        elif line:
            return line, comment
    raise DataError(f"{source.name} holds no points; give a file with one point a line")


def _delimiter(line: str) -> str | None:
    return ";" if ";" in line else "," if "," in line else None


def _split(line: str, delimiter: str | None) -> list[str]:
    return [word.strip() for word in line.split(delimiter)]


def _words(line: str) -> list[str]:
    return _split(line, _delimiter(line))


def _is_count(words: list[str]) -> bool:
    return len(words) == 1 and words[0].isdigit()


def _fits(told: list[str], first: str) -> bool:
    """Whether a comment around the count names the columns of the first line of numbers, coordinates among them."""
    return len(told) == len(_words(first)) and _hold_coordinates(told)


def _hold_coordinates(names: Sequence[str]) -> bool:
    return set(XYZ) <= {plain_name(name) for name in names}


def _are_numbers(words: list[str]) -> bool:
    try:
        return bool([float(word.strip('"').replace(",", ".")) for word in words])
    except ValueError:
        return False
