"""Wavefront .obj files with their materials.

A reader of our own, because trimesh counts relative vertex numbers from the end of the file, clips vertex colours of
0-255, reads one material library, and holds the text many times over.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from pointalign.data.files.polygons import cut_polygons
from pointalign.data.files.source import (
    MAX_LINE_BYTES,
    MAX_PARTS,
    MAX_TEXT_MESH_BYTES,
    MAX_VERTICES,
    Source,
    failures_told,
)
from pointalign.data.files.surface import Paint, Part, Surface, plain_paint
from pointalign.data.files.textures import Companions, Pictures
from pointalign.errors import DataError

# What map_Kd may say before the file's name, and how many words each option takes; of the last three at least one, and as
# many more as are numbers.
MAP_OPTIONS = {
    **dict.fromkeys(["-blendu", "-blendv", "-cc", "-clamp", "-bm", "-boost", "-texres", "-imfchan", "-type"], 1),
    "-mm": 2,
    **dict.fromkeys(["-o", "-s", "-t"], 3),
}
PLACING = ("-o", "-s", "-t")
# Statements whose words are names, in which a # may stand.
NAMING = (b"usemtl", b"mtllib")


@dataclass
class Material:
    """What a material library says of one material: Kd, map_Kd (and whether that is moved or scaled) and its opacity."""

    diffuse: list[float] | None = None
    texture: str | None = None
    placed: bool = False
    opacity: float = 1.0


@dataclass
class _Faces:
    """The faces that wear one material: corners as numbers of vertices and texture coordinates (-1 for none)."""

    vertices: array = field(default_factory=lambda: array("i"))
    uvs: array = field(default_factory=lambda: array("i"))
    sizes: array = field(default_factory=lambda: array("i"))


class _Reader:
    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.positions, self.colors, self.uvs = array("d"), array("d"), array("d")
        self.groups: dict[str | None, _Faces] = {}
        self.libraries: list[str] = []
        faces = self.groups.setdefault(None, _Faces())
        for line in _whole_lines(source):
            words = line.split(b"#", 1)[0].split() if b"#" in line and not line.startswith(NAMING) else line.split()
            match words[0] if words else b"":
                case b"v":
                    self._vertex(words)
                case b"vt":
                    self.uvs.extend((float(words[1]), float(words[2]) if len(words) > 2 else 0.0))
                case b"f":
                    self._face(words, faces)
                case b"usemtl":
                    faces = self.groups.setdefault(_rest(line), _Faces())
                    if len(self.groups) > MAX_PARTS:
                        raise DataError(f"{self.name} has more than {MAX_PARTS:,} materials; join them")
                case b"mtllib":
                    self.libraries.append(_rest(line))
        if len(self.positions) > 3 * MAX_VERTICES:
            raise DataError(f"{self.name} has more than {MAX_VERTICES:,} vertices; decimate the mesh")

    def _vertex(self, words: list[bytes]) -> None:
        if len(words) < 4:
            raise DataError(f"{self.name} has a vertex of {len(words) - 1} numbers; the file is broken")
        self.positions.extend(map(float, words[1:4]))
        if len(words) >= 7:
            self.colors.extend(map(float, words[4:7]))

    def _face(self, words: list[bytes], faces: _Faces) -> None:
        num_vertices, num_uvs = len(self.positions) // 3, len(self.uvs) // 2
        for word in words[1:]:
            numbers = word.split(b"/")
            faces.vertices.append(self._counted(int(numbers[0]), num_vertices))
            has_uv = len(numbers) > 1 and numbers[1]
            faces.uvs.append(self._counted(int(numbers[1]), num_uvs) if has_uv else -1)
        faces.sizes.append(len(words) - 1)

    def _counted(self, number: int, count: int) -> int:
        """A number of the file counted from zero; one below zero counts back from the last thing so far."""
        place = number - 1 if number > 0 else count + number
        if number == 0 or place < 0:
            raise DataError(f"{self.name} has a face that refers to number {number} of {count}; the file is broken")
        return place


def _whole_lines(source: Source) -> Iterator[bytes]:
    """Lines, those that end in a backslash joined to the next."""
    begun = b""
    for line in source.lines():
        if line.rstrip(b"\r\n").endswith(b"\\") and len(begun) < MAX_LINE_BYTES:
            begun += line.rstrip(b"\r\n")[:-1] + b" "
            continue
        yield begun + line if begun else line
        begun = b""
    yield begun


def _rest(line: bytes) -> str:
    """What follows the first word."""
    words = line.strip().split(None, 1)
    return words[1].decode("utf-8", errors="replace").strip() if len(words) > 1 else ""


def read_obj(source: Source) -> Surface:
    """Read an .obj: polygons, materials (Kd, map_Kd, d) and vertex colours; without faces its vertices are a cloud.

    Raises:
        DataError: when it is too large, broken, or names vertices that there are not.
    """
    source.check_size(MAX_TEXT_MESH_BYTES, "decimate the mesh or save it as .glb or binary .ply")
    reader = _Reader(source)
    vertices = (
        np.frombuffer(reader.positions, dtype=np.float64).reshape(-1, 3) if reader.positions else np.empty((0, 3))
    )
    rgb = _vertex_colors(reader, len(vertices))
    companions, pictures = Companions(source), Pictures(source.name)
    materials: dict[str, Material] = {}
    for library in reader.libraries:
        for name in companions.names_in(library):
            materials.update(_read_library(name, companions))
    surface = Surface()
    for name, faces in reader.groups.items():
        if len(faces.sizes):
            material = _worn(name or "", materials, companions)
            surface.add(_part(reader, faces, vertices, rgb, _paint(material, companions, pictures)), source.name)
    if not surface.parts:
        surface.points = vertices if rgb is None else np.concatenate([vertices, rgb], axis=1)
    surface.notes += [*companions.notes, *pictures.notes]
    return surface


def _vertex_colors(reader: _Reader, count: int) -> np.ndarray | None:
    """(V, 3) in [0, 1], when every vertex has one."""
    if not count or len(reader.colors) != 3 * count:
        return None
    rgb = np.frombuffer(reader.colors, dtype=np.float64).reshape(-1, 3)
    if not (rgb.min() >= 0 and rgb.max() <= 255):
        raise DataError(f"{reader.name} has vertex colours beyond 0-255; export it again")
    return rgb / 255 if rgb.max() > 1 else rgb


def _part(reader: _Reader, faces: _Faces, vertices: np.ndarray, rgb: np.ndarray | None, paint: Paint) -> Part:
    sizes = np.frombuffer(faces.sizes, dtype=np.int32)
    starts = np.cumsum(sizes) - sizes
    corners = np.array(faces.vertices, dtype=np.int32)
    cut, triangles = cut_polygons(sizes, corners, starts, vertices, reader.name)
    if paint.texture is not None:
        # The last row, (0, 0), is for corners that have none.
        uvs = np.append(np.frombuffer(reader.uvs, dtype=np.float64) if reader.uvs else [], [0.0, 0.0]).reshape(-1, 2)
        places = np.array(faces.uvs, dtype=np.int32)
        if len(places) and places.max() >= len(uvs) - 1:
            raise DataError(f"{reader.name} has a face with texture coordinates that there are not; it is broken")
        if len(places) and places.max() >= 0:
            paint.uv, paint.uv_corners = np.nan_to_num(uvs), cut.of_corners(places, starts)
    if rgb is not None and paint.uv is None and not paint.colored:
        paint.corner_rgba, paint.colored = np.concatenate([rgb, np.ones((len(rgb), 1))], axis=1), True
    return Part(vertices, triangles, paint)


def _worn(name: str, materials: dict[str, Material], companions: Companions) -> Material | None:
    """The material of a name, which a comment may follow; one that no library has is noted."""
    found = materials.get(name) or materials.get(name.split("#")[0].strip())
    if name and materials and found is None:
        companions.note(f"material {name!r} is in none of its libraries")
    return found


def _read_library(name: str, companions: Companions) -> dict[str, Material]:
    try:
        data = companions.get(name)
    except FileNotFoundError:
        return {}  # and `companions` has noted it
    with failures_told(f"the material library {name!r}"):
        return parse_materials(data)


def parse_materials(data: bytes) -> dict[str, Material]:
    """What a .mtl file says of each material's colour.

    `Tr` is not read: exporters disagree on whether it is `d` or one minus it.

    Source: the Wavefront MTL format.
    """
    materials: dict[str, Material] = {}
    current = Material()
    for line in data.splitlines():
        words = line.split()
        match words[0].lower() if words else b"":
            case b"newmtl":
                current = materials.setdefault(_rest(line), Material())
            case b"kd" if words[1:2] != [b"spectral"]:
                values = [float(word) for word in words[1:4]]
                current.diffuse = values if len(values) == 3 else values[:1] * 3
            case b"map_kd":
                current.texture, current.placed = _map_name(_rest(line))
            case b"d":
                current.opacity = float(words[-1])
    return materials


def _map_name(text: str) -> tuple[str, bool]:
    """The texture's file, and whether options move or scale the texture."""
    words, placed = text.split(), False
    while words and (option := words[0].lower()) in MAP_OPTIONS:
        count = MAP_OPTIONS[option]
        if option in PLACING:
            placed = True
            count = 1 + sum(1 for _ in takewhile(_is_number, words[2 : 1 + count]))
        words = words[1 + count :]
    return (text if words == text.split() else " ".join(words)), placed


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _paint(material: Material | None, companions: Companions, pictures: Pictures) -> Paint:
    paint = plain_paint()
    if material is None:
        return paint
    paint.opacity = material.opacity
    if material.diffuse:
        paint.rgba, paint.colored = np.array([*np.clip(material.diffuse, 0, 1), 1.0]), True
    if material.texture:
        try:
            data = companions.get(material.texture)
        except FileNotFoundError:
            return paint  # and `companions` has noted it
        if material.placed:
            companions.note(f"texture {material.texture!r} is moved or scaled by its material, which is not done")
        paint.texture = pictures.decode(data, material.texture)
        paint.colored = paint.colored or paint.texture is not None
    return paint
