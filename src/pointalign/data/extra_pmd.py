"""PMD meshes, the compiled model format of the game 0 A.D.: its surface in rest pose and the places for attached models.

The layout, little-endian: "PSMD", version, size of what follows; vertices (position, normal, UV sets, bone blend);
triangles; bones; attachment points. Vertices are stored where the rest pose puts them, so that bones are not needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from pointalign.errors import DataError

MAGIC = b"PSMD"
VERSION = 4
BLEND_BYTES = 20  # four bone numbers and four weights
BONE_BYTES = 28  # translation and quaternion
NO_BONE = 0xFF
MAX_UV_SETS = 16


@dataclass(frozen=True)
class PmdModel:
    """One mesh.

    Attributes:
        vertices: (V, 3) float64 in the game's left-handed axes, y up.
        faces: (F, 3) int64 indices into the vertices.
        uv: (T, V, 2) float64, T >= 1 texture coordinate sets.
        points: attachment points by name, each a (4, 4) matrix from the attached model's axes to this model's.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    points: dict[str, np.ndarray]


class _Reader:
    """Takes values off a byte string and never past its end."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise DataError(f"cannot read {self.where}: it ends at byte {len(self.data)}; the file is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def floats(self, count: int) -> np.ndarray:
        values = np.frombuffer(self.take(4 * count), "<f4").astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"cannot read {self.where}: a coordinate is not finite; the file is broken")
        return values


def read_pmd(data: bytes, where: str) -> PmdModel:
    """Read a mesh.

    Args:
        data: the file's bytes.
        where: what to call it in an error.

    Raises:
        DataError: when it is no PMD file of version 4, cut short, or points outside itself.
    """
    reader = _Reader(data, where)
    magic, version, size = struct.unpack("<4sII", reader.take(12))
    if magic != MAGIC or version != VERSION:
        raise DataError(f"cannot read {where}: no PMD file of version {VERSION}; give a .pmd of 0 A.D. 0.0.26")
    if size != len(data) - 12:
        raise DataError(
            f"cannot read {where}: it tells of {size} bytes and has {len(data) - 12}; the file is cut short"
        )
    count, uv_sets = reader.number(), reader.number()
    if not 1 <= uv_sets <= MAX_UV_SETS:
        raise DataError(f"cannot read {where}: it has {uv_sets} texture coordinate sets; the file is broken")
    stride = 24 + 8 * uv_sets + BLEND_BYTES
    rows = np.frombuffer(reader.take(stride * count), np.uint8).reshape(count, stride)
    shown = np.ascontiguousarray(rows[:, : stride - BLEND_BYTES]).view("<f4").astype(np.float64)
    faces = np.frombuffer(reader.take(6 * reader.number()), "<u2").reshape(-1, 3).astype(np.int64)
    if not np.isfinite(shown).all() or (faces >= count).any():
        raise DataError(
            f"cannot read {where}: a face names no vertex or a coordinate is not finite; the file is broken"
        )
    uv = shown[:, 6:].reshape(count, uv_sets, 2).transpose(1, 0, 2)
    bones = [_matrix(reader.floats(7)) for _ in range(reader.number())]
    return PmdModel(shown[:, :3], faces, uv, _points(reader, bones))


def _points(reader: _Reader, bones: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Attachment points; one that hangs on a bone is moved to where the rest pose has that bone. The first name wins."""
    found: dict[str, np.ndarray] = {}
    for _ in range(reader.number()):
        name = reader.take(reader.number()).decode("latin-1")
        matrix, bone = _matrix(reader.floats(7)), reader.take(1)[0]
        if bone != NO_BONE and bone >= len(bones):
            raise DataError(f"cannot read {reader.where}: point {name!r} hangs on no bone; the file is broken")
        found.setdefault(name, matrix if bone == NO_BONE else bones[bone] @ matrix)
    return found


def _matrix(values: np.ndarray) -> np.ndarray:
    """(4, 4) from a translation (x, y, z) and a quaternion (x, y, z, w); a quaternion of length 0 turns nothing."""
    matrix = np.eye(4)
    matrix[:3, 3] = values[:3]
    length = np.linalg.norm(values[3:])
    if length > 0:
        x, y, z, w = values[3:] / length
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    return matrix
