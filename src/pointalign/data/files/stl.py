""".stl files, binary and text: triangles without colours."""

from __future__ import annotations

from array import array

import numpy as np

from pointalign.data.files.source import MAX_FACES, MAX_MESH_BYTES, MAX_TEXT_MESH_BYTES, Source
from pointalign.data.files.surface import Part, Surface, plain_paint
from pointalign.errors import DataError

HEADER_BYTES = 84
TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
TRIANGLES_AT_ONCE = 2**18


def read_stl(source: Source) -> Surface:
    """Read a .stl; it is binary when its length is what its header announces, whatever its first word.

    Raises:
        DataError: when it is too large, cut short, or neither kind.
    """
    head = source.file.read(HEADER_BYTES)
    count = int.from_bytes(head[80:84], "little")
    if len(head) == HEADER_BYTES and source.size == HEADER_BYTES + count * TRIANGLE.itemsize:
        corners = _read_binary(source, count)
    elif head.lstrip().lower().startswith(b"solid") and b"\0" not in head:
        source.file.seek(0)
        corners = _read_text(source)
    else:
        raise DataError(
            f"{source.name} announces {count} triangles and has {source.size} bytes; it is cut short or no .stl"
        )
    faces = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    surface = Surface()
    if len(faces):
        surface.add(Part(corners, faces, plain_paint()), source.name)
    return surface


def _read_binary(source: Source, count: int) -> np.ndarray:
    source.check_size(MAX_MESH_BYTES, "decimate the mesh")
    if count > MAX_FACES:
        raise DataError(f"{source.name} has {count:,} triangles, more than {MAX_FACES:,}; decimate the mesh")
    corners = np.empty((count, 3, 3), dtype=np.float32)
    for start in range(0, count, TRIANGLES_AT_ONCE):
        some = min(TRIANGLES_AT_ONCE, count - start)
        corners[start : start + some] = np.frombuffer(source.read_exactly(some * TRIANGLE.itemsize), TRIANGLE)[
            "corners"
        ]
    return corners.reshape(-1, 3)


def _read_text(source: Source) -> np.ndarray:
    source.check_size(MAX_TEXT_MESH_BYTES, "save it as binary .stl")
    numbers = array("d")
    for line in source.lines():
        words = line.split()
        if words and words[0].lower() == b"vertex":
            if len(words) != 4:
                raise DataError(f"{source.name} has a vertex of {len(words) - 1} numbers; the file is broken")
            numbers.extend(map(float, words[1:]))
    corners = np.frombuffer(numbers, dtype=np.float64).reshape(-1, 3)
    if len(corners) % 3:
        raise DataError(f"{source.name} ends within a triangle; the file is cut short")
    return corners
