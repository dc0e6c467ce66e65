""".off files (Geomview), with or without colours of vertices and faces."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator

import numpy as np

from pointalign.data.files.polygons import cut_polygons
from pointalign.data.files.source import MAX_FACES, MAX_TEXT_MESH_BYTES, MAX_VERTICES, Source
from pointalign.data.files.surface import UNCOLORED, Paint, Part, Surface, plain_paint
from pointalign.errors import DataError


def read_off(source: Source) -> Surface:
    """Read an .off, also where the counts follow its first word on the same line, as in ModelNet40.

    Raises:
        DataError: when it is too large, cut short or broken.
    """
    source.check_size(MAX_TEXT_MESH_BYTES, "decimate the mesh or save it as binary .ply")
    lines = _lines(source)
    word, *rest = next(lines, [b""])
    kind = re.fullmatch(rb"C?OFF(\d*)", word, re.IGNORECASE)
    if kind is None:
        raise DataError(f"{source.name} is no OFF or COFF; export it as one of them or as .ply")
    rest = [kind[1], *rest] if kind[1] else rest
    counts = [int(count) for count in (rest or next(lines, []))[:2]]
    if len(counts) < 2 or min(counts) < 0:
        raise DataError(f"{source.name} does not say how many vertices and faces it has; the file is broken")
    if max(counts) > source.size or counts[0] > MAX_VERTICES or counts[1] > MAX_FACES:
        raise DataError(f"{source.name} announces {counts[0]} vertices and {counts[1]} faces, more than it can hold")
    vertices = _vertices(source, lines, counts[0])
    surface = Surface()
    if counts[1]:
        surface.add(_part(source, lines, counts[1], vertices), source.name)
    else:
        color = _fractions(vertices[:, 3:6], source)
        surface.points = vertices[:, :3] if color is None else np.concatenate([vertices[:, :3], color], axis=1)
    return surface


def _lines(source: Source) -> Iterator[list[bytes]]:
    for line in source.lines():
        if words := line.split(b"#")[0].split():
            yield words


def _vertices(source: Source, lines: Iterator[list[bytes]], count: int) -> np.ndarray:
    numbers = array("d")
    width = 0
    for row in range(count):
        words = next(lines, None)
        width = width or len(words or ())
        if words is None or len(words) != width or width < 3:
            raise DataError(f"{source.name} has no whole vertex {row} of {count}; the file is cut short or broken")
        numbers.extend(map(float, words))
    return np.frombuffer(numbers, dtype=np.float64).reshape(count, max(width, 3))


def _part(source: Source, lines: Iterator[list[bytes]], count: int, vertices: np.ndarray) -> Part:
    flat, sizes, shown, colors = array("i"), array("i"), array("i"), array("d")
    for row in range(count):
        words = next(lines, None)
        size = int(words[0]) if words else 0
        if words is None or not 0 <= size < len(words):
            raise DataError(f"{source.name} has no whole face {row} of {count}; the file is cut short or broken")
        sizes.append(size)
        flat.extend(map(int, words[1 : size + 1]))
        if len(words) - size - 1 in (3, 4):
            shown.append(row)
            colors.extend(map(float, words[size + 1 : size + 4]))
    counts = np.array(sizes)
    cut, faces = cut_polygons(counts, np.array(flat), np.cumsum(counts) - counts, vertices, source.name)
    rgba = np.tile([*UNCOLORED, 1.0], (count, 1)) if shown else None
    if rgba is not None:
        rgba[np.array(shown), :3] = _fractions(np.array(colors).reshape(-1, 3), source)
    return Part(vertices[:, :3], faces, _paint(source, vertices, None if rgba is None else cut.of_polygons(rgba)))


def _paint(source: Source, vertices: np.ndarray, rgba: np.ndarray | None) -> Paint:
    """Colours of the corners, else of the faces (F, 4)."""
    rgb = _fractions(vertices[:, 3:6], source)
    if rgb is None:
        return plain_paint() if rgba is None else Paint(rgba)
    paint = plain_paint()
    paint.colored, paint.corner_rgba = True, np.concatenate([rgb, np.ones((len(rgb), 1))], axis=1)
    return paint


def _fractions(colors: np.ndarray, source: Source) -> np.ndarray | None:
    """Colours (N, 3) in [0, 1]: Geomview writes whole numbers up to 255, or fractions."""
    if colors.shape[1] < 3 or not len(colors):
        return None
    low, high = colors.min(), colors.max()
    if not (low >= 0 and high <= 255):
        raise DataError(f"{source.name} has colours from {low:g} to {high:g}, not 0-1 or 0-255; export it again")
    return colors / 255 if high > 1 else colors
