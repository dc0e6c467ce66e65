"""Faces with any number of corners, as triangles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pointalign.data.files.source import MAX_FACES
from pointalign.errors import DataError

# Polygons of more corners are left as fans, and so are all where there are more corners of concave ones: each is cut by itself.
MOST_CORNERS, MOST_CORNERS_IN_ALL = 256, 100_000
# Triangles whose normals are held against their polygon's at one time.
TRIANGLES_AT_ONCE = 2**18


class Fans(NamedTuple):
    """Polygons cut into triangles, each polygon a fan around its first corner, unless it is concave.

    Attributes:
        polygons: (T,) the polygon that each triangle is cut from; all in order where every polygon is a triangle.
        inside: (T, 3) or (1, 3) which of its polygon's corners a triangle has.
    """

    polygons: np.ndarray | slice
    inside: np.ndarray

    def of_corners(self, flat: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """(T, 3) values of the triangles' corners.

        Args:
            flat: the values of all polygons' corners, one after the other.
            starts: (P,) where each polygon's begin.
        """
        if isinstance(self.polygons, slice) and len(flat) == 3 * len(starts):
            return flat.reshape(-1, 3)
        return flat[self.places(starts)]

    def places(self, starts: np.ndarray, step: int = 1) -> np.ndarray:
        """(T, 3) where a corner's values begin, `step` of them for each corner."""
        return np.asarray(starts)[self.polygons][:, None] + step * self.inside

    def of_polygons(self, values: np.ndarray) -> np.ndarray:
        """(T, ...) values of the triangles' polygons, from (P, ...)."""
        return values[self.polygons]


def fans(counts: np.ndarray, where: str) -> Fans:
    """Cut polygons into triangles; polygons of fewer than three corners vanish.

    Args:
        counts: (P,) how many corners each polygon has.
        where: what to call the file in an error.

    Raises:
        DataError: when there are more than MAX_FACES triangles.
    """
    if (counts == 3).all():
        return Fans(slice(None), np.arange(3)[None])
    triangles = (np.asarray(counts, dtype=np.int64) - 2).clip(min=0)
    total = int(triangles.sum())
    if total > MAX_FACES:
        raise DataError(f"{where} has {total:,} triangles, more than {MAX_FACES:,}; decimate the mesh")
    polygons = np.repeat(np.arange(len(triangles)), triangles)
    step = np.arange(total) - np.repeat(np.cumsum(triangles) - triangles, triangles) + 1
    return Fans(polygons, np.stack([np.zeros_like(step), step, step + 1], axis=1))


def checked_faces(faces: np.ndarray, num_vertices: int, where: str) -> np.ndarray:
    """Faces (F, 3) as int32.

    Raises:
        DataError: when one names a vertex that there is not.
    """
    if len(faces) and not (faces.min() >= 0 and faces.max() < num_vertices):
        wrong = int(faces.max()) if faces.max() >= num_vertices else int(faces.min())
        raise DataError(f"{where} has a face with vertex {wrong}, and {num_vertices} vertices; the file is broken")
    return faces.view(np.int32) if faces.dtype == np.uint32 else faces.astype(np.int32, copy=False)


def cut_polygons(
    counts: np.ndarray, flat: np.ndarray, starts: np.ndarray, vertices: np.ndarray, where: str
) -> tuple[Fans, np.ndarray]:
    """Cut polygons into triangles: fans, and concave ones ear by ear, so that nothing lies outside of them.

    Args:
        counts: (P,) how many corners each polygon has.
        flat: the vertices' numbers at all polygons' corners, one after the other.
        starts: (P,) where each polygon's begin.
        vertices: (V, 3 or more), xyz first.
        where: what to call the file in an error.

    Returns:
        How they are cut, and the triangles (T, 3) as int32.

    Raises:
        DataError: when there are more than MAX_FACES triangles, or one names a vertex that there is not.
    """
    cut = fans(counts, where)
    faces = checked_faces(cut.of_corners(flat, starts), len(vertices), where)
    if isinstance(cut.polygons, slice):
        return cut, faces
    concave, normals = _concave(cut.polygons, faces, vertices, len(counts))
    sizes = np.asarray(counts)[concave]
    small = sizes <= MOST_CORNERS
    if not small.any() or sizes[small].sum() > MOST_CORNERS_IN_ALL:
        return cut, faces
    for polygon, size in zip(concave[small].tolist(), sizes[small].tolist(), strict=True):
        corners = flat[starts[polygon] : starts[polygon] + size].astype(np.int64)
        first = int(np.searchsorted(cut.polygons, polygon))
        cut.inside[first : first + size - 2] = _ears(vertices[corners, :3].astype(np.float64), normals[polygon])
    return cut, checked_faces(cut.of_corners(flat, starts), len(vertices), where)


def _concave(
    polygons: np.ndarray, faces: np.ndarray, vertices: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the polygons in whose fan a triangle is turned against the whole, and all polygons' (P, 3) area vectors."""
    whole, turned = np.zeros((count, 3)), np.zeros(count, dtype=bool)
    pieces = [slice(at, at + TRIANGLES_AT_ONCE) for at in range(0, len(faces), TRIANGLES_AT_ONCE)]
    with np.errstate(all="ignore"):  # of coordinates that are not finite
        for piece in pieces:
            np.add.at(whole, polygons[piece], _area_vectors(faces[piece], vertices))
        for piece in pieces:
            along = np.einsum("ij,ij->i", _area_vectors(faces[piece], vertices), whole[polygons[piece]])
            turned[polygons[piece][along < 0]] = True
    return np.flatnonzero(turned), whole


def _area_vectors(faces: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, corner], :3].astype(np.float64) for corner in range(3))
    return np.cross(b - a, c - a)


def _ears(corners: np.ndarray, normal: np.ndarray) -> list[tuple[int, int, int]]:
    """Triangles (n - 2) of one polygon (n, 3), by its corners' numbers; a fan of what has no ear, as where sides cross.

    Source: Meisters 1975, "Polygons have ears".
    """
    axis = int(np.abs(normal).argmax())
    flat = np.delete(corners, axis, axis=1)
    if (normal[axis] > 0) == (axis == 1):  # so that the polygon turns left
        flat = flat[:, ::-1]
    left, triangles = list(range(len(corners))), []
    while len(left) > 3:
        ear = next((at for at in range(len(left)) if _is_ear(flat, left, at)), None)
        if ear is None:
            break
        triangles.append((left[ear - 1], left[ear], left[(ear + 1) % len(left)]))
        del left[ear]
    return triangles + [(left[0], left[at], left[at + 1]) for at in range(1, len(left) - 1)]


def _is_ear(flat: np.ndarray, left: list[int], at: int) -> bool:
    """Whether the corner turns left, and no other lies in the triangle of it and its neighbours."""
    before, here, after = left[at - 1], left[at], left[(at + 1) % len(left)]
    triangle = flat[[before, here, after]]
    edges = np.roll(triangle, -1, axis=0) - triangle
    if edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0] <= 0:
        return False
    others = flat[[corner for corner in left if corner not in (before, here, after)]]
    away = others[:, None] - triangle[None]
    return not ((edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0]) > 0).all(axis=1).any()
