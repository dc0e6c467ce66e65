"""Which objects are meant: files, folders and patterns become one list of paths, each object once."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pointalign.data.files.source import FORMATS
from pointalign.errors import ConfigError

STANDARD_INPUT = "-"


class Input(NamedTuple):
    """One object that an answer is wanted for.

    Args:
        path: as people wrote it, or below a folder that they wrote.
        error: why there is nothing to read there; None for what is to be read.
    """

    path: str
    error: str | None = None

    @property
    def key(self) -> str:
        """The same for all ways of writing a path from the same working folder."""
        return os.path.abspath(self.path)


def find_inputs(paths: Sequence[str]) -> list[Input]:
    """Expand folders and patterns.

    A folder means all files below it with the ending of a 3D format, without hidden ones, ordered by name; a pattern (`*`,
    `?`, `[...]`, and `**` for folders below) what it matches; any other path itself, whatever its ending. What is named
    twice counts once. A folder without such files and a pattern that matches nothing stay in the list with an error.

    Args:
        paths: as the command got them.

    Raises:
        ConfigError: when there are none, or standard input is among several.
    """
    if not paths:
        raise ConfigError("no object is named; give 3D files, folders or patterns")
    if STANDARD_INPUT in paths and len(paths) > 1:
        raise ConfigError("standard input (-) goes alone; give it or paths")
    found: dict[str, Input] = {}
    for path in paths:
        for thing in _expand(path):
            found.setdefault(thing.key, thing)
    return list(found.values())


def _expand(path: str) -> Iterator[Input]:
    if path == STANDARD_INPUT or os.path.isfile(path) or not (os.path.isdir(path) or glob.has_magic(path)):
        yield Input(path)
        return
    matches = [path] if os.path.isdir(path) else sorted(glob.iglob(path, recursive=True))
    # `**` matches a folder and what lies in it; the files are then found through the folder too.
    for match in matches:
        if not os.path.isdir(match):
            yield Input(match)
            continue
        files = list(_files_below(match))
        if not files and len(matches) == 1:
            yield Input(match, f"{match} holds no 3D file; known endings are {', '.join(FORMATS)}")
        yield from files
    if not matches:
        yield Input(path, f"no file matches {path}; check the path")


def _files_below(folder: str) -> Iterator[Input]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in FORMATS and "." in name:
                yield Input(os.path.join(parent, name))
