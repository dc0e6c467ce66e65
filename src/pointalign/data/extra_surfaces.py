"""What the readers of game models give: triangles with the picture and the colour they wear."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pointalign.data.files.surface import Paint, Part


@dataclass(frozen=True)
class Surfaces:
    """Triangles that wear one texture and one colour.

    Attributes:
        corners: (F, 3, 3) float64 corners, right-handed axes, y up.
        uv: (F, 3, 2) float64 texture coordinates, v upwards.
        texture: the image's name, or None.
        rgb: the material's colour, each in [0, 1]; a texture is multiplied by it.
        opacity: 1 is solid.
    """

    corners: np.ndarray
    uv: np.ndarray
    texture: str | None
    rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    opacity: float = 1.0


def as_parts(surfaces: Iterable[Surfaces], open_image: Callable[[str], np.ndarray]) -> list[Part]:
    """The surfaces as `sample_surface` draws from them.

    Args:
        surfaces: each becomes one part.
        open_image: gives a texture by its name, (H, W, 4) uint8 RGBA, first row on top; what it raises is passed on.
    """
    parts = []
    for surface in surfaces:
        paint = Paint(np.array([*surface.rgb, 1.0]), opacity=surface.opacity)
        if surface.texture is not None:
            paint.texture = tinted(open_image(surface.texture), surface.rgb)
            paint.uv = surface.uv.reshape(-1, 2)
        vertices = surface.corners.reshape(-1, 3)
        parts.append(Part(vertices, np.arange(len(vertices)).reshape(-1, 3), paint))
    return parts


def tinted(pixels: np.ndarray, rgb: tuple[float, float, float]) -> np.ndarray:
    """An image (H, W, 4) uint8 with its colours multiplied by rgb, each in [0, 1]."""
    if min(rgb) >= 1:
        return pixels
    return (pixels * np.array([*rgb, 1.0])).round().astype(np.uint8)
