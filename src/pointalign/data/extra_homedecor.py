"""Models of the Debian package minetest-mod-homedecor: OBJ meshes whose groups wear tiles.

The game gives the n-th group of a mesh the n-th tile; which tiles those are stands in Lua code, and here in a table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pointalign.data.extra_names import HomedecorRow
from pointalign.data.extra_surfaces import Surfaces
from pointalign.errors import DataError

# Turns z upwards: meshes for nodes that hang on walls lie on their backs.
UP_FROM_Z = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def homedecor_surfaces(row: HomedecorRow, mesh: Path) -> list[Surfaces]:
    """An object's surfaces; groups without a tile are left out.

    Raises:
        DataError: when the mesh is missing or broken, or has another number of groups than the table has tiles.
    """
    groups = read_obj_groups(_text(mesh), str(mesh))
    if len(groups) != len(row.tiles):
        raise DataError(
            f"{mesh} has {len(groups)} groups, the table {len(row.tiles)} tiles for {row.id}; mend the table"
        )
    surfaces = []
    for tile, rows in zip(row.tiles, groups, strict=True):
        if tile:
            image, _, color = tile.partition("#")
            places = rows[..., :3] if row.up == "y" else rows[..., :3] @ UP_FROM_Z.T
            surfaces.append(Surfaces(places, rows[..., 3:], image.removesuffix("*") or None, _rgb(color)))
    return surfaces


def _rgb(color: str) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of "rrggbb"; white of nothing."""
    red, green, blue = bytes.fromhex(color or "ffffff")
    return red / 255, green / 255, blue / 255


def read_obj_groups(text: str, where: str) -> list[np.ndarray]:
    """The triangles of each group of a Wavefront text, as (F, 3, 5) of x, y, z, u, v; polygons are cut into fans.

    Faces before the first group make a group of their own; groups without faces are left out.

    Raises:
        DataError: when a line cannot be read, or a face names what is not there.
    """
    places: list[list[float]] = []
    uv: list[list[float]] = []
    groups: dict[str, list[np.ndarray]] = {}
    group = ""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        try:
            match words[:1]:
                case ["v"]:
                    places.append([float(word) for word in words[1:4]])
                case ["vt"]:
                    uv.append([float(word) for word in words[1:3]])
                case ["g"]:
                    group = " ".join(words[1:])
                case ["f"]:
                    corners = np.array([_corner(word, places, uv) for word in words[1:]])
                    fan = np.arange(1, len(corners) - 1)
                    triangles = np.stack([corners[np.zeros_like(fan)], corners[fan], corners[fan + 1]], axis=1)
                    groups.setdefault(group, []).append(triangles)
        except (ValueError, IndexError) as error:
            raise DataError(f"cannot read {where}, line {number}: {error}; the file is broken") from error
    found = [np.concatenate(triangles) for triangles in groups.values()]
    if not found or not all(np.isfinite(rows).all() for rows in found):
        raise DataError(f"cannot read {where}: no faces, or a coordinate that is not finite; the file is broken")
    return found


def _corner(word: str, places: list[list[float]], uv: list[list[float]]) -> list[float]:
    """x, y, z, u, v of one corner of a face, "7/3/2" or "7": numbers count from 1, negative ones from the end."""
    place, _, rest = word.partition("/")
    coordinate = rest.partition("/")[0]
    return [*places[_index(place)], *(uv[_index(coordinate)] if coordinate else (0.0, 0.0))]


def _index(word: str) -> int:
    number = int(word)
    if number == 0:
        raise ValueError("numbers count from 1")
    return number - 1 if number > 0 else number


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no mesh at {path}; unpack the Debian package minetest-mod-homedecor again")
    return path.read_text(encoding="latin-1")
