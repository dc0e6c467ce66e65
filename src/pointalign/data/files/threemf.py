""".3mf files (3D Manufacturing Format): the build's objects where it puts them, with the colours of their triangles.

A reader of our own: trimesh reads no colours from them and needs lxml.
"""

from __future__ import annotations

import zipfile
from array import array
from dataclasses import dataclass, field
from typing import IO, NamedTuple
from xml.etree import ElementTree

import numpy as np

from pointalign.data.files.polygons import checked_faces
from pointalign.data.files.source import MAX_XML_BYTES, Source, readable
from pointalign.data.files.surface import UNCOLORED, Paint, Part, Surface, plain_paint
from pointalign.data.files.xml_guard import refuse_declarations
from pointalign.data.files.zips import open_zip
from pointalign.errors import DataError

MAIN_PART = "3d/3dmodel.model"
# Objects that are placed, counted through objects made of objects.
MAX_PLACED = 20_000
MAX_DEPTH = 64
NO_COLOR = 0

Key = tuple[str, str]


class Placed(NamedTuple):
    """An object put somewhere: its file and number, and the (4, 3) transform of its points as rows."""

    key: Key
    transform: np.ndarray


@dataclass
class Model:
    """One object: its own triangles with the palette's colours at their corners, or the objects that it is made of."""

    group: list[int] | None = None
    default: int = NO_COLOR
    vertices: array = field(default_factory=lambda: array("d"))
    faces: array = field(default_factory=lambda: array("q"))
    colors: array = field(default_factory=lambda: array("q"))
    parts: list[Placed] = field(default_factory=list)


def read_3mf(source: Source) -> Surface:
    """Read a .3mf: colours from its base materials and colour groups; textures are not read.

    Raises:
        DataError: when it is broken, unpacks to more than MAX_XML_BYTES, or places more than MAX_PLACED objects.

    Source: 3MF Core Specification 1.3, Materials and Properties Extension 1.2, Production Extension 1.1.
    """
    reader = _Archive(open_zip(source), source.name)
    surface = Surface(up="z")
    for item in reader.build():
        reader.place(item, np.eye(4, 3), surface, 0)
    surface.notes += sorted(reader.notes)
    return surface


class _Archive:
    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self.archive, self.name = archive, name
        self.members = {info.filename.lower().lstrip("/"): info for info in archive.infolist()}
        self.models: dict[Key, Model] = {}
        self.palette: list[tuple[float, ...]] = [(*UNCOLORED, 1.0)]
        self.colors = np.empty((0, 4))
        self.items: list[Placed] = []
        self.notes: set[str] = set()
        self.read: set[str] = set()
        self.left = MAX_XML_BYTES
        self.placed = 0

    def build(self) -> list[Placed]:
        """What the main model file places."""
        main = next((name for name in self.members if name == MAIN_PART), None)
        main = main or next((name for name in self.members if name.endswith(".model")), None)
        if main is None:
            raise DataError(f"{self.name} holds no 3D model; export it as .3mf again")
        self._read_part(main)
        return self.items

    def place(self, item: Placed, transform: np.ndarray, surface: Surface, depth: int) -> None:
        """Add an object, and what it is made of, to the surface."""
        self.placed += 1
        if self.placed > MAX_PLACED or depth > MAX_DEPTH:
            raise DataError(
                f"{self.name} places more than {MAX_PLACED:,} objects or nests them too deep; export it flat"
            )
        if item.key[0] not in self.read:
            self._read_part(item.key[0])
        model = self.models.get(item.key)
        if model is None:
            raise DataError(f"{self.name} places an object that there is not, {item.key[1][:20]!r}; the file is broken")
        turned = np.concatenate(
            [item.transform[:3] @ transform[:3], item.transform[3:] @ transform[:3] + transform[3:]]
        )
        if model.faces:
            vertices = np.frombuffer(model.vertices, dtype=np.float64).reshape(-1, 3)
            faces = checked_faces(np.frombuffer(model.faces, np.int64).reshape(-1, 3), len(vertices), self.name)
            surface.add(Part(vertices @ turned[:3] + turned[3], faces, _paint(model, self._colors())), self.name)
        for piece in model.parts:
            self.place(piece, turned, surface, depth + 1)

    def _colors(self) -> np.ndarray:
        """The palette (P, 4), one array for all objects until another part adds to it."""
        if len(self.colors) != len(self.palette):
            self.colors = np.array(self.palette)
        return self.colors

    def _read_part(self, part: str) -> None:
        self.read.add(part)
        info = self.members.get(part)
        if info is None:
            raise DataError(f"{self.name} lacks {part[:60]!r}; the file is cut short")
        self.left -= info.file_size
        if self.left < 0:
            raise DataError(f"{self.name} unpacks to more than {readable(MAX_XML_BYTES)}; decimate the mesh")
        with self.archive.open(info) as stream:
            refuse_declarations(stream, self.name)
        with self.archive.open(info) as stream:
            self._parse(stream, part)

    def _parse(self, stream: IO[bytes], part: str) -> None:
        """Read one model file; elements are dropped as soon as they are understood."""
        groups: dict[str, list[int]] = {}
        group: list[int] = []
        model, above = Model(), []
        for event, element in ElementTree.iterparse(stream, events=("start", "end")):
            name = element.tag.rpartition("}")[2]
            if event == "start":
                above.append(element)
                if name == "object":
                    model = self.models.setdefault((part, element.attrib["id"]), Model())
                    model.group = groups.get(element.attrib.get("pid", ""))
                    model.default = model.group[int(element.attrib.get("pindex", 0))] if model.group else NO_COLOR
                elif name in ("basematerials", "colorgroup"):
                    group = groups.setdefault(element.attrib["id"], [])
                elif name in ("base", "color"):
                    group.append(len(self.palette))
                    self.palette.append(_color(element.attrib.get("displaycolor") or element.attrib["color"]))
                elif name in ("texture2dgroup", "multiproperties", "compositematerials"):
                    self.notes.add(f"3MF {name} is not read as colours")
                continue
            if name == "vertex":
                model.vertices.extend(float(element.attrib[axis]) for axis in "xyz")
            elif name == "triangle":
                _triangle(model, element.attrib, groups)
            elif name in ("component", "item"):
                path = next((v for k, v in element.attrib.items() if k.rpartition("}")[2] == "path"), None)
                key = (part if path is None else path.lower().lstrip("/"), element.attrib["objectid"])
                placed = Placed(key, _transform(element.attrib.get("transform")))
                (model.parts if name == "component" else self.items).append(placed)
            above.pop()
            if above:
                above[-1].remove(element)


def _triangle(model: Model, attributes: dict[str, str], groups: dict[str, list[int]]) -> None:
    model.faces.extend(int(attributes[corner]) for corner in ("v1", "v2", "v3"))
    group = groups.get(attributes["pid"]) if "pid" in attributes else model.group
    if group and "p1" in attributes:
        model.colors.extend(group[int(attributes.get(corner, attributes["p1"]))] for corner in ("p1", "p2", "p3"))
    else:
        model.colors.extend([model.default] * 3)


def _color(text: str) -> tuple[float, ...]:
    """#RRGGBB or #RRGGBBAA, sRGB, as RGBA in [0, 1]."""
    digits = text.removeprefix("#")
    if len(digits) not in (6, 8):
        raise ValueError(f"{text[:20]!r} is no colour")
    values = tuple(int(digits[at : at + 2], 16) / 255 for at in range(0, len(digits), 2))
    return values if len(values) == 4 else (*values, 1.0)


def _transform(text: str | None) -> np.ndarray:
    """(4, 3) matrix that points are multiplied with from the left, as rows with a one behind."""
    return np.eye(4, 3) if text is None else np.array(text.split(), dtype=np.float64).reshape(4, 3)


def _paint(model: Model, palette: np.ndarray) -> Paint:
    corners = np.frombuffer(model.colors, dtype=np.int64).reshape(-1, 3)
    paint = plain_paint()
    if corners.any():
        paint.colored, paint.corner_rgba, paint.corners = True, palette, corners
    return paint
