"""AC3D models (.ac): a tree of objects with surfaces, each with its texture and its material.

Surfaces are convex polygons; lines and points are left out, for they have no area.

Source: Inivis, "The AC3D file format", versions AC3Da and AC3Db.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pointalign.data.extra_surfaces import Surfaces
from pointalign.errors import DataError

MAGIC = "AC3D"
POLYGON = 0
TYPE_BITS = 0x0F
MAX_DEPTH = 64
MAX_COUNT = 1_000_000


class _Lines:
    """The file line by line, as words."""

    def __init__(self, text: str, where: str) -> None:
        self.lines, self.where, self.at = text.splitlines(), where, 0

    def fail(self, what: str) -> DataError:
        """The error that says where reading stopped."""
        return DataError(f"cannot read {self.where}, line {self.at}: {what}; the file is broken or cut short")

    def next(self) -> list[str]:
        """Words of the next line that has any."""
        while self.at < len(self.lines):
            self.at += 1
            if words := self.lines[self.at - 1].split():
                return words
        raise self.fail("it ends too early")

    def rest(self) -> str:
        """What follows the first word of the line that was read last, without quotes."""
        return self.lines[self.at - 1].strip().partition(" ")[2].strip().strip('"')

    def skip(self, characters: int) -> None:
        """Pass over a text of that length, which may hold line breaks."""
        while characters > 0 and self.at < len(self.lines):
            characters -= len(self.lines[self.at]) + 1
            self.at += 1

    def floats(self, words: list[str], count: int) -> np.ndarray:
        """The first words as finite numbers."""
        try:
            values = np.array([float(word) for word in words[:count]])
        except ValueError:
            values = np.empty(0)
        if len(values) != count or not np.isfinite(values).all():
            raise self.fail(f"{' '.join(words)[:40]!r} should be {count} numbers")
        return values

    def count(self, words: list[str], most: int) -> int:
        """The number after a keyword."""
        if len(words) < 2 or not words[1].isdecimal() or int(words[1]) > most:
            raise self.fail(f"{' '.join(words)[:40]!r} should give a count of at most {most}")
        return int(words[1])


def read_ac3d(text: str, where: str, without: Sequence[str] = ()) -> list[Surfaces]:
    """Read a model's surfaces, moved to where its tree of objects puts them.

    Args:
        text: the file's text.
        where: what to call it in an error.
        without: objects whose name or texture has one of these words in it, in lower case, are left out.

    Returns:
        One entry for each texture and material, in the order of their first surface; empty when there is no polygon.

    Raises:
        DataError: when the text is no AC3D model, is cut short, or names a vertex or material that is not there.
    """
    lines = _Lines(text, where)
    if not text.startswith(MAGIC):
        raise DataError(f"cannot read {where}: it does not start with {MAGIC}; give an AC3D model")
    lines.next()
    materials: list[tuple[tuple[float, float, float], float]] = []
    found: dict[tuple[str | None, int], list[np.ndarray]] = {}
    while lines.at < len(lines.lines):
        if not lines.lines[lines.at].strip():
            lines.at += 1
            continue
        words = lines.next()
        if words[0] == "MATERIAL":
            materials.append(_material(lines))
        elif words[0] == "OBJECT":
            _read_object(lines, found, len(materials), np.eye(4), 0, without)
    surfaces = []
    for (texture, number), triangles in found.items():
        if texture and any(word in texture.lower() for word in without):
            continue
        rows = np.concatenate(triangles)
        rgb, opacity = materials[number]
        surfaces.append(Surfaces(rows[..., :3], rows[..., 3:], texture, rgb, opacity))
    return surfaces


def _material(lines: _Lines) -> tuple[tuple[float, float, float], float]:
    """Colour and opacity of the MATERIAL line that was read last; its numbers count by place, for some name them wrong."""
    words = lines.lines[lines.at - 1].rpartition('"')[2].split()
    red, green, blue = lines.floats(words[1:], 3).clip(0, 1).tolist()
    transparency = lines.floats(words[words.index("trans") + 1 :], 1)[0] if "trans" in words else 0.0
    return (red, green, blue), float(1 - transparency)


def _read_object(
    lines: _Lines,
    found: dict[tuple[str | None, int], list[np.ndarray]],
    materials: int,
    parent: np.ndarray,
    depth: int,
    without: Sequence[str],
) -> None:
    """Read one OBJECT with its children; `parent` is the (4, 4) matrix of what it hangs on."""
    if depth > MAX_DEPTH:
        raise lines.fail(f"objects are nested more than {MAX_DEPTH} deep")
    local, texture, repeat, offset = np.eye(4), None, np.ones(2), np.zeros(2)
    vertices = np.empty((0, 3))
    while True:
        words = lines.next()
        match words[0]:
            case "data":
                lines.skip(lines.count(words, MAX_COUNT))
            case "name":
                if any(word in lines.rest().lower() for word in without):
                    found = {}
            case "texture":
                texture = lines.rest() or None
            case "texrep":
                repeat = lines.floats(words[1:], 2)
            case "texoff":
                offset = lines.floats(words[1:], 2)
            case "rot":  # written for row vectors, so that the matrix is turned over
                local[:3, :3] = lines.floats(words[1:], 9).reshape(3, 3).T
            case "loc":
                local[:3, 3] = lines.floats(words[1:], 3)
            case "numvert":
                count = lines.count(words, len(lines.lines))
                vertices = np.array([lines.floats(lines.next(), 3) for _ in range(count)]).reshape(-1, 3)
            case "numsurf":
                matrix = parent @ local
                placed = vertices @ matrix[:3, :3].T + matrix[:3, 3]
                for _ in range(lines.count(words, len(lines.lines))):
                    number, triangles = _surface(lines, placed, materials)
                    if len(triangles):
                        triangles[..., 3:] = triangles[..., 3:] * repeat + offset
                        found.setdefault((texture, number), []).append(triangles)
            case "kids":
                for _ in range(lines.count(words, len(lines.lines))):
                    if lines.next()[0] != "OBJECT":
                        raise lines.fail("a child OBJECT should stand here")
                    _read_object(lines, found, materials, parent @ local, depth + 1, without)
                return


def _surface(lines: _Lines, vertices: np.ndarray, materials: int) -> tuple[int, np.ndarray]:
    """Material number and triangles (F, 3, 5) of x, y, z, u, v of one SURF; none when it is a line."""
    words, number = lines.next(), 0
    try:
        flags = int(words[1], 0) if words[0] == "SURF" else -1
    except (IndexError, ValueError):
        flags = -1
    if flags < 0:
        raise lines.fail("a SURF with flags should stand here")
    while (words := lines.next())[0] != "refs":
        if words[0] == "mat":
            number = lines.count(words, materials - 1)
    corners = np.array([lines.floats(lines.next(), 3) for _ in range(lines.count(words, len(lines.lines)))])
    if flags & TYPE_BITS != POLYGON or len(corners) < 3:
        return number, np.empty((0, 3, 5))
    index = corners[:, 0].astype(np.int64)
    if (index != corners[:, 0]).any() or index.min() < 0 or index.max() >= len(vertices) or not materials:
        raise lines.fail("a surface names a vertex or material that is not there")
    rows = np.concatenate([vertices[index], corners[:, 1:]], axis=1)
    fan = np.arange(1, len(rows) - 1)
    return number, np.stack([rows[np.zeros_like(fan)], rows[fan], rows[fan + 1]], axis=1)
