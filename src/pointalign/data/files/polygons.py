"""Faces with any number of corners, as triangles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pointalign.data.files.source import MAX_FACES
from pointalign.errors import DataError


class Fans(NamedTuple):
    """Polygons cut into triangles, each polygon a fan around its first corner.

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
