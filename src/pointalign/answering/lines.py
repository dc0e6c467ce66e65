"""One JSON line per object, in a file that a killed run goes on from, or on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, RenderableType

from pointalign.errors import DataError
from pointalign.storage import taken_lock, write_text, written_file

Row = dict[str, Any]
PIECE = 2**16
# Of the settings: where relative paths start from, as seen from the lines' folder; None while there are none.
WORKING_FOLDER = "working_folder"


class Answers(NamedTuple):
    """What came of some objects.

    Args:
        rows: with `path`, and what the job gives or an `error`.
        uncolored: how many of the clouds had no colour.
    """

    rows: list[Row]
    uncolored: int = 0


def json_line(row: Row) -> bytes:
    """A row as one line of UTF-8; names that are no text are written with escapes, and read back as they were."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


class StandardOutput:
    """Writes rows to standard output as they come; nothing is there from before.

    Args:
        drawn: a row as people read it on a terminal, for rich; JSON there too when None.

    Raises:
        DataError: when it is closed from the start.
    """

    def __init__(self, drawn: Callable[[Row], RenderableType] | None = None) -> None:
        if sys.stdout is None:
            raise DataError("standard output is closed; give --out FILE to keep the lines")
        self.done: dict[str, bool] = {}
        self._drawn = drawn

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows.

        Raises:
            DataError: when nobody reads any more.
        """
        try:
            if self._drawn is not None and sys.stdout.isatty():
                # Through `sys.stdout`, where a progress bar gives way to what is printed.
                for row in rows:
                    Console().print(self._drawn(row))
                return
            sys.stdout.flush()
            sys.stdout.buffer.write(b"".join(map(json_line, rows)))
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            # What Python still holds for a closed pipe would fail again when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise DataError("standard output was closed; give --out FILE to keep the lines") from error

    def close(self) -> None:
        """Nothing is left to do."""


class LinesFile:
    """A file of rows, each written whole, that a later run goes on from.

    Beside it lies `NAME.settings.json`, which says what the rows depend on, so that those of another model or question are
    never taken for these. A line that a kill cut short is dropped.

    Args:
        path: the file.
        settings: what the rows depend on; of `WORKING_FOLDER` a file that has none yet learns.
        retry_errors: drop rows with an error, to try them again.

    Attributes:
        done: by absolute path, whether the row that is there from before is an error.

    Raises:
        DataError: when the file is broken, is of other settings, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], retry_errors: bool = False) -> None:
        if not path.name:
            raise DataError(f"cannot write {str(path)!r}: it is a folder; name a file")
        self.path = path
        self.settings_file = path.with_name(path.name + ".settings.json")
        self._start = os.getcwd()
        self._lock = taken_lock(self.path).lock
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a+b", buffering=0)
                undo.callback(lambda: self._file.close())
                self._check_settings(json.loads(json.dumps(settings)))
                self._drop_unfinished_line()
                self.done = dict(self._read())
                if retry_errors and any(self.done.values()):
                    self._drop_errors()
            except OSError as error:
                raise self._unwritable(error) from error
            undo.pop_all()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        is_new = self._file.seek(0, os.SEEK_END) == 0
        if is_new:
            self._write_settings(settings)
            return
        try:
            saved = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f"{self.path} is there already, but {self.settings_file.name}, which says how it was made, is missing or "
                "broken; name another --out, or delete both"
            ) from error
        here, there = settings.get(WORKING_FOLDER), saved.get(WORKING_FOLDER)
        settings, saved = {**settings, WORKING_FOLDER: here or there}, {**saved, WORKING_FOLDER: there or here}
        changed = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if changed:
            raise DataError(
                f"{self.path} holds answers with another {' and '.join(name.replace('_', ' ') for name in changed)}; name "
                "another --out, or delete it"
            )
        if there is not None:
            self._start = os.path.normpath(os.path.join(os.path.realpath(self.path.parent), there))
        elif here is not None:
            self._write_settings(saved)

    def _write_settings(self, settings: dict[str, Any]) -> None:
        write_text(self.settings_file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")

    def _drop_unfinished_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end:
            start = self._file.seek(max(0, end - PIECE))
            found = self._file.read(end - start).rfind(b"\n")
            end = start + found + 1
            if found >= 0:
                break
        if end < size:
            self._file.truncate(end)

    def _read(self) -> Iterator[tuple[str, bool]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    yield os.path.normpath(os.path.join(self._start, row["path"])), "error" in row
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}, line {number} is broken ({type(error).__name__}); mend it, or name another --out"
                    ) from error

    def _drop_errors(self) -> None:
        with written_file(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(line for line in old if "error" not in json.loads(line))
        self.done = {key: False for key, failed in self.done.items() if not failed}
        self._file.close()
        self._file = self.path.open("a+b", buffering=0)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows, all of them or none.

        Raises:
            DataError: when the disk is full or the file cannot be written any more.
        """
        lines = b"".join(map(json_line, rows))
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(lines):
                written += self._file.write(lines[written:]) or 0
        except OSError as error:
            self._file.truncate(end)
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Let another process write the file."""
        self._file.close()
        self._lock.release()

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self.path}: {error.strerror or error}; free some space or name another --out, and run the same "
            "command again to go on"
        )
