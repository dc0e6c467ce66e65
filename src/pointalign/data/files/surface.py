"""Surfaces that wear colours, and points drawn from them: uniformly by area, coloured where they fall.

A colour comes from a texture read through the corners' UV, else from the corners' colours, else from the face's or the
material's. glTF multiplies the three, in linear light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pointalign.data.files.source import MAX_FACES, MAX_PARTS, MAX_VERTICES
from pointalign.errors import DataError

UNCOLORED = (0.5, 0.5, 0.5)
# Below this opacity a surface is not seen at all: the empty part of a leaf's texture, a material that hides a helper
# part. Window glass is clearly above it.
VISIBLE_OPACITY = 0.1
REDRAWS = 32
FACES_AT_ONCE = 2**20
REPEAT, CLAMP, MIRROR = 10497, 33071, 33648


@dataclass
class Paint:
    """What a part wears.

    Attributes:
        rgba: (4,) or (F, 4) in [0, 1]; sRGB, or linear where `linear`.
        colored: whether the file gave a colour; else `rgba` is a stand-in.
        corner_rgba: (K, 4) colours of corners, 0-255 where they are uint8, else in [0, 1].
        corners: (F, 3) rows of corner_rgba; None when they are the part's faces.
        texture: (H, W, 4) uint8 sRGB, first row on top.
        uv: (K, 2) texture coordinates, v upwards.
        uv_corners: (F, 3) rows of uv; None when they are the part's faces.
        wrap: how u and v go on beyond 0 and 1: REPEAT, CLAMP or MIRROR.
        linear: the glTF way: colours are linear light, and texture, corners and material multiply.
        opaque: alpha means nothing.
        cutoff: the smallest alpha that is seen.
        opacity: of the whole part.
    """

    rgba: np.ndarray
    colored: bool = True
    corner_rgba: np.ndarray | None = None
    corners: np.ndarray | None = None
    texture: np.ndarray | None = None
    uv: np.ndarray | None = None
    uv_corners: np.ndarray | None = None
    wrap: tuple[int, int] = (REPEAT, REPEAT)
    linear: bool = False
    opaque: bool = False
    cutoff: float = VISIBLE_OPACITY
    opacity: float = 1.0

    def colors(self, faces: np.ndarray, numbers: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """RGBA in [0, 1], sRGB, of places on the part.

        Args:
            faces: (F, 3) the part's faces.
            numbers: (n,) which faces.
            bary: (n, 3) barycentric places in them.
        """
        flat = self.rgba[numbers] if self.rgba.ndim == 2 else np.broadcast_to(self.rgba, (len(numbers), 4))
        if not self.linear:
            if self.texture is not None and self.uv is not None:
                return self._texels(faces, numbers, bary)
            return flat if self.corner_rgba is None else self._blended(faces, numbers, bary)
        rgba = flat.astype(np.float64)
        if self.corner_rgba is not None:
            rgba *= self._blended(faces, numbers, bary)
        if self.texture is not None and self.uv is not None:
            texels = self._texels(faces, numbers, bary)
            # A texture that nothing tints keeps its values to the bit.
            tinted = (rgba[:, :3] != 1).any(axis=1)
            rgba[:, 3] *= texels[:, 3]
            rgba[tinted, :3] = to_srgb(rgba[tinted, :3] * to_linear(texels[tinted, :3]))
            rgba[~tinted, :3] = texels[~tinted, :3]
        else:
            rgba[:, :3] = to_srgb(rgba[:, :3])
        return rgba

    def _blended(self, faces: np.ndarray, numbers: np.ndarray, bary: np.ndarray) -> np.ndarray:
        assert self.corner_rgba is not None
        rgba = self.corner_rgba[(faces if self.corners is None else self.corners)[numbers]]
        return np.einsum("nk,nkd->nd", bary, rgba / 255.0 if rgba.dtype == np.uint8 else rgba)

    def _texels(self, faces: np.ndarray, numbers: np.ndarray, bary: np.ndarray) -> np.ndarray:
        assert self.texture is not None
        assert self.uv is not None
        uv = self.uv[(faces if self.uv_corners is None else self.uv_corners)[numbers]]
        u, v = np.einsum("nk,nkd->dn", bary, np.asarray(uv, dtype=np.float64))
        height, width = self.texture.shape[:2]
        column = _wrapped(np.floor(u * width).astype(np.int64), width, self.wrap[0])
        row = _wrapped(np.floor((1 - v) * height).astype(np.int64), height, self.wrap[1])
        return self.texture[row, column] / 255.0


def plain_paint() -> Paint:
    """What a part wears of which the file says nothing."""
    return Paint(np.array([*UNCOLORED, 1.0]), colored=False)


@dataclass
class Part:
    """A piece of a surface: vertices (V, 3) where the scene shows them, faces (F, 3), and what it wears."""

    vertices: np.ndarray
    faces: np.ndarray
    paint: Paint


@dataclass
class Surface:
    """What a mesh file holds.

    Attributes:
        parts: the pieces with faces.
        points: (N, 3) or (N, 6), rgb in [0, 1]: points that belong to no face.
        up: the axis that points up where the format says so: "y" or "z".
        unit: of coordinates in metres, where the format says so.
        notes: what the reader has to say.
        num_faces, num_vertices: of all parts.
    """

    parts: list[Part] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    up: str | None = None
    unit: float | None = None
    notes: list[str] = field(default_factory=list)
    num_faces: int = 0
    num_vertices: int = 0

    def add(self, part: Part, where: str) -> None:
        """Take in a part.

        Raises:
            DataError: when the whole becomes larger than MAX_FACES, MAX_VERTICES or MAX_PARTS.
        """
        if not self.parts or self.parts[-1].vertices is not part.vertices:  # parts may share them
            self.num_vertices += len(part.vertices)
        self.num_faces += len(part.faces)
        self.parts.append(part)
        if len(self.parts) > MAX_PARTS:
            raise DataError(f"{where} has more than {MAX_PARTS:,} parts; join them")
        if self.num_faces > MAX_FACES or self.num_vertices > MAX_VERTICES:
            raise DataError(
                f"{where} unfolds to {self.num_faces:,} faces and {self.num_vertices:,} vertices or more; at most "
                f"{MAX_FACES:,} and {MAX_VERTICES:,} are read: decimate the mesh"
            )


class Drawn(NamedTuple):
    """Points (N, 6) float64 drawn from a surface, and how many faces had coordinates that are not finite."""

    points: np.ndarray
    left_out: int


def sample_surface(parts: Sequence[Part], num_points: int, seed: int, where: str = "the mesh") -> Drawn:
    """Draw coloured points from a surface, uniformly by area; what is fully transparent is not drawn from.

    Args:
        parts: of the surface.
        num_points: how many, at least 1.
        seed: of numpy's default generator; the same surface and seed give the same points.
        where: what to call it in an error.

    Returns:
        (num_points, 6) xyz in the surface's own units and axes, rgb (sRGB) in [0, 1]. Faces whose coordinates are not
        finite are left out and counted.

    Raises:
        DataError: when num_points is below 1, or the surface has no area.
    """
    if num_points < 1:
        raise DataError(f"cannot sample {num_points} points; ask for at least 1")
    if not parts:
        raise DataError(f"{where} holds no faces; give a mesh with a surface")
    starts = np.cumsum([0, *(len(part.faces) for part in parts)])
    weights, left_out = _weights(parts, starts, seen=True)
    if not weights.sum() > 0:
        weights, left_out = _weights(parts, starts, seen=False)
    if not 0 < weights.sum() < np.inf:
        raise DataError(f"{where} has a surface without area or coordinates that are not finite; repair the mesh")
    ends = np.cumsum(weights, out=weights)
    rng = np.random.default_rng(seed)
    points, opaque = _draw(rng, num_points, ends, starts, parts)
    for _ in range(REDRAWS):
        if opaque.all():
            break
        holes = np.flatnonzero(~opaque)
        points[holes], opaque[holes] = _draw(rng, len(holes), ends, starts, parts)
    return Drawn(points, left_out)


def _draw(
    rng: np.random.Generator, count: int, ends: np.ndarray, starts: np.ndarray, parts: Sequence[Part]
) -> tuple[np.ndarray, np.ndarray]:
    """One draw: points (count, 6) and whether each lies on something that can be seen (count,)."""
    faces = np.searchsorted(ends, rng.random(count) * ends[-1], side="right").clip(max=len(ends) - 1)
    # The square root makes it uniform in the triangle. Source: Osada et al. 2002, "Shape Distributions", equation 1.
    root, along = np.sqrt(rng.random(count)), rng.random(count)
    bary = np.stack([1 - root, root * (1 - along), root * along], axis=1)
    points = np.empty((count, 6))
    opaque = np.ones(count, dtype=bool)
    owners = np.searchsorted(starts, faces, side="right") - 1
    order = np.argsort(owners, kind="stable")
    found, firsts = np.unique(owners[order], return_index=True)
    for owner, mine in zip(found, np.split(order, firsts[1:]), strict=True):
        part = parts[owner]
        numbers = faces[mine] - starts[owner]
        corners = np.asarray(part.vertices[part.faces[numbers]], dtype=np.float64)
        points[mine, :3] = np.einsum("nk,nkd->nd", bary[mine], corners)
        rgba = part.paint.colors(part.faces, numbers, bary[mine])
        points[mine, 3:] = rgba[:, :3]
        opaque[mine] = part.paint.opaque | (rgba[:, 3] >= part.paint.cutoff)
    return points, opaque


def _weights(parts: Sequence[Part], starts: np.ndarray, seen: bool) -> tuple[np.ndarray, int]:
    """Areas of all triangles (F,), 0 where they are not finite or, on request, not seen; and how many are not finite."""
    weights, left_out = np.zeros(starts[-1]), 0
    for part, start in zip(parts, starts, strict=False):
        if seen and not part.paint.opacity >= VISIBLE_OPACITY:
            continue
        for first in range(0, len(part.faces), FACES_AT_ONCE):
            triangles = np.asarray(part.vertices[part.faces[first : first + FACES_AT_ONCE]], dtype=np.float64)
            edges = triangles[:, 1:] - triangles[:, :1]
            areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
            broken = ~np.isfinite(areas)
            left_out += int(broken.sum())
            weights[start + first : start + first + len(areas)] = np.where(broken, 0, areas)
    return weights, left_out


def _wrapped(places: np.ndarray, size: int, wrap: int) -> np.ndarray:
    """Texel numbers (n,) brought into [0, size)."""
    if wrap == CLAMP:
        return places.clip(0, size - 1)
    if wrap == MIRROR:
        places = places % (2 * size)
        return np.where(places < size, places, 2 * size - 1 - places)
    return places % size


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] as linear light. Source: IEC 61966-2-1."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light, clipped to [0, 1], as sRGB. Source: IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
