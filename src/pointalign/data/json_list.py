"""JSON lists too long to be held as Python objects: one entry after another, each with its place in the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pointalign.errors import DataError

MEBIBYTE = 1 << 20
_blanks = re.compile(r"[ \t\n\r]*").match
_digits = re.compile(r"[-+.eE\d]*").match
_decode = json.JSONDecoder().raw_decode


class _Window:
    """The part of a file's text that is being read, and the place in bytes of what comes next."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self.file, self.advance = file, advance
        self.text, self.at, self.place = "", 0, 0
        self._to_text = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> bool:
        """Drop what was read and read on, in ever larger pieces while one entry does not fit; false at the end."""
        data = self.file.read(max(MEBIBYTE, len(self.text) - self.at))
        if len(data) >= MEBIBYTE:
            self.advance(len(data) // MEBIBYTE)
        text = self._to_text.decode(data, final=not data)
        if data:
            self.text, self.at = self.text[self.at :] + text, 0
        return bool(data)

    def move(self, end: int) -> bytes:
        """Go to an index of the text; the bytes that lie between."""
        passed = self.text[self.at : end].encode()
        self.at, self.place = end, self.place + len(passed)
        return passed

    def mark(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        self.move(_blanks(self.text, self.at).end())  # pyright: ignore[reportOptionalMemberAccess]
        while self.at == len(self.text) and self.more():
            self.move(_blanks(self.text, self.at).end())  # pyright: ignore[reportOptionalMemberAccess]
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """The same, and go past it."""
        mark = self.mark()
        self.move(self.at + len(mark))
        return mark

    def value(self) -> tuple[Any, int, bytes]:
        """The value that comes next, where it starts, and its bytes."""
        self.mark()
        while True:
            try:
                value, end = _decode(self.text, self.at)
                # A number at the edge may go on; anything else is whole where it ends.
                if _digits(self.text, end).end() < len(self.text) or not self.more():  # pyright: ignore[reportOptionalMemberAccess]
                    return value, self.place, self.move(end)
            except json.JSONDecodeError:
                if not self.more():
                    raise


def json_entries(
    path: Path, advance: Callable[[int], None] = lambda mebibytes: None
) -> Iterator[tuple[Any, int, bytes]]:
    """The entries of a JSON file that holds one list, in memory of the size of an entry.

    Args:
        path: the file, in UTF-8.
        advance: called with the number of mebibytes read since the last call.

    Yields:
        An entry, the place of its first byte in the file, and its bytes.

    Raises:
        OSError: when the file cannot be read.
        DataError: when it is not JSON, or holds anything but a list; in the words of `json.loads`, with line and column.
    """
    with path.open("rb") as file:
        window = _Window(file, advance)
        try:
            if window.take() != "[":
                raise ValueError("no list")
            mark = window.take() if window.mark() == "]" else ","
            while mark == ",":
                yield window.value()
                mark = window.take()
            if mark != "]" or window.mark():
                raise ValueError("no end")
        except (ValueError, RecursionError) as error:
            raise _refusal(path) from error


def _refusal(path: Path) -> DataError:
    """Why a file is not a JSON list. Only the text is held whole: no entry outlives its parsing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entry: {})
    except (ValueError, RecursionError) as error:
        return DataError(f"{path} is not JSON ({error}); copy it again")
    if isinstance(value, list):
        return DataError(f"{path} changed while it was read; start again when it is written whole")
    return DataError(f"{path} holds a {type(value).__name__}, not a list of conversations; give another file")
