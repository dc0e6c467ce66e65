"""Meshes in .ply files: polygons, colours of vertices or faces, textures as MeshLab writes them."""

from __future__ import annotations

import numpy as np

from pointalign.data.files.columns import RGB, plain_name
from pointalign.data.files.ply import Header, Lists, Rows, read_elements
from pointalign.data.files.polygons import Fans, cut_polygons
from pointalign.data.files.source import Source
from pointalign.data.files.surface import Paint, Part, Surface, plain_paint
from pointalign.data.files.textures import Companions, Pictures
from pointalign.errors import DataError

INDEX_NAMES = ("vertex_indices", "vertex_index")
UV_NAMES = (("texture_u", "texture_v"), ("s", "t"), ("u", "v"))


def read_ply_mesh(source: Source, header: Header) -> Surface:
    """Read the faces of a .ply.

    Raises:
        DataError: when it is too large, cut short, or its faces are not plain polygons.
    """
    if header.element("tristrips") is not None:
        raise DataError(f"{source.name} holds triangle strips; export it with plain faces")
    elements = read_elements(source, header, {"vertex", "face"})
    rows, faces = elements.get("vertex", {}), elements["face"]
    indices = next((value for name in INDEX_NAMES if isinstance(value := faces.get(name), Lists)), None)
    if indices is None or not {"x", "y", "z"} <= rows.keys() or any(isinstance(rows[axis], Lists) for axis in "xyz"):
        raise DataError(f"{source.name} has faces but no {INDEX_NAMES[0]} or no x, y, z; export it again")
    vertices = np.stack([np.asarray(rows[axis]) for axis in "xyz"], axis=1)
    cut, triangles = cut_polygons(indices.counts, indices.flat, indices.starts, vertices, source.name)
    surface, companions, pictures = Surface(), Companions(source), Pictures(source.name)
    textures = _textures(header, companions, pictures)
    paint = _plain_or_colored(rows, faces, cut, source.name)
    if textures and _take_uv(paint, rows, faces, indices, cut):
        numbers = faces.get("texnumber")
        which = np.zeros(len(triangles), dtype=np.int64)
        if isinstance(numbers, np.ndarray) and len(textures) > 1:
            which = cut.of_polygons(numbers).astype(np.int64).clip(0, len(textures) - 1)
        for number, texture in enumerate(textures):
            mine = which == number
            if mine.any():
                surface.add(Part(vertices, triangles[mine], _worn(paint, mine, texture)), source.name)
    elif len(triangles):
        surface.add(Part(vertices, triangles, paint), source.name)
    surface.notes += [*companions.notes, *pictures.notes]
    return surface


def _textures(header: Header, companions: Companions, pictures: Pictures) -> list[np.ndarray | None]:
    textures: list[np.ndarray | None] = []
    for name in header.textures:
        try:
            textures.append(pictures.decode(companions.get(name), name))
        except FileNotFoundError:
            textures.append(None)  # and `companions` has noted it
    return textures


def _plain_or_colored(rows: Rows, faces: Rows, cut: Fans, where: str) -> Paint:
    paint = plain_paint()
    for_vertices, for_faces = _rgba(rows, where), _rgba(faces, where)
    if for_vertices is not None:
        paint.corner_rgba, paint.colored = for_vertices, True
    elif for_faces is not None:
        paint.rgba, paint.colored = cut.of_polygons(for_faces) / (255 if for_faces.dtype == np.uint8 else 1), True
    return paint


def _rgba(rows: Rows, where: str) -> np.ndarray | None:
    """(N, 4) colours: uint8, or floats in [0, 1]."""
    named = {plain_name(name): value for name, value in rows.items() if isinstance(value, np.ndarray)}
    if not set(RGB) <= named.keys():
        return None
    rgb = [named[channel] for channel in RGB]
    if all(channel.dtype == np.uint8 for channel in rgb):
        return np.stack([*rgb, np.full_like(rgb[0], 255)], axis=1)
    values = np.stack(rgb, axis=1).astype(np.float32)
    low, high = values.min(), values.max()
    full = 1 if high <= 1 else 255 if high <= 255 else 65535
    if not (low >= 0 and high <= 65535) or 1 < high < 2:
        raise DataError(f"{where} has colours from {low:g} to {high:g}, not 0-1, 0-255 or 0-65535; export it again")
    return np.concatenate([values / full, np.ones((len(values), 1), dtype=np.float32)], axis=1)


def _take_uv(paint: Paint, rows: Rows, faces: Rows, indices: Lists, cut: Fans) -> bool:
    """Give the paint texture coordinates, of the faces' corners or of the vertices; whether there are any."""
    wedges = faces.get("texcoord")
    if isinstance(wedges, Lists) and (wedges.counts >= 2 * indices.counts).all():
        places = cut.places(wedges.starts, 2)
        paint.uv = np.nan_to_num(np.stack([wedges.flat[places], wedges.flat[places + 1]], axis=2).reshape(-1, 2))
        paint.uv_corners = np.arange(len(paint.uv)).reshape(-1, 3)
        return True
    for u, v in UV_NAMES:
        if isinstance(rows.get(u), np.ndarray) and isinstance(rows.get(v), np.ndarray):
            paint.uv = np.nan_to_num(np.stack([np.asarray(rows[u]), np.asarray(rows[v])], axis=1).astype(np.float64))
            return True
    return False


def _worn(paint: Paint, mine: np.ndarray, texture: np.ndarray | None) -> Paint:
    """The paint of some of the faces, with their texture."""
    rgba = paint.rgba[mine] if paint.rgba.ndim == 2 else paint.rgba
    corners = None if paint.uv_corners is None else paint.uv_corners[mine]
    colored = paint.colored or texture is not None
    return Paint(rgba, colored, paint.corner_rgba, texture=texture, uv=paint.uv, uv_corners=corners)
