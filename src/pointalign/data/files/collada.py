""".dae files (COLLADA), opened by trimesh and pycollada once they have been found harmless."""

from __future__ import annotations

import importlib.util
import re
import zipfile

from pointalign.data.files.source import MAX_XML_BYTES, Source
from pointalign.data.files.surface import Surface
from pointalign.data.files.textures import Companions, Pictures
from pointalign.data.files.xml_guard import refuse_declarations
from pointalign.errors import DataError, MissingDependencyError

# Bytes of geometry that a scene shows, counted anew each time that it shows them: pycollada reads them anew each time.
MAX_SHOWN_BYTES = 4 * MAX_XML_BYTES
MAX_SHOWN_NODES = 100_000
UP_AXES = {"Y_UP": "y", "Z_UP": "z"}
HEAD_BYTES = 2**16
PRIMITIVES = ("triangles", "polylist", "polygons")


def read_dae(source: Source) -> Surface:
    """Read a .dae: its scene with transforms, diffuse colours and textures.

    Raises:
        DataError: when it is too large, broken, or its scene unfolds to more than is read.
        MissingDependencyError: when pycollada is not installed.
    """
    # trimesh takes a quarter of a second to import, which the other formats do without.
    from pointalign.data.files.meshes import paint_of, parts_of, read_mesh

    if importlib.util.find_spec("collada") is None:
        raise MissingDependencyError("reading .dae needs pycollada: pip install pycollada")
    source.check_size(MAX_XML_BYTES, "save it as .glb")
    if zipfile.is_zipfile(source.file):
        raise DataError(f"{source.name} is a zip archive; unpack it and give the .dae in it")
    source.file.seek(0)
    guard = _Guard(source.name)
    guard.check(source)
    source.file.seek(0)
    axis = re.search(rb"<up_axis>\s*([XYZ]_UP)\s*</up_axis>", source.file.read(HEAD_BYTES))
    source.file.seek(0)
    up = UP_AXES.get(axis[1].decode()) if axis else "y"
    if up is None:
        raise DataError(f"{source.name} has x up, which is not turned; export it with y or z up")
    companions, pictures = Companions(source), Pictures(source.name)
    mesh = read_mesh(source.file, "dae", companions, source.name)
    surface = Surface(up=up)
    for part in parts_of(mesh, lambda visual: paint_of(visual, pictures)):
        surface.add(part, source.name)
    if guard.controllers:
        surface.notes.append(f"{guard.controllers} skinned pieces were left out")
    if guard.covered:
        surface.notes.append("colours of vertices that lie under a material were not read")
    surface.notes += [*companions.notes, *pictures.notes]
    return surface


class _Guard:
    """Counts what a scene unfolds to before pycollada unfolds it.

    A node that is shown twice shows twice what it holds, so that forty nodes of two references each are a million
    million; each is counted once here. And a polygon that says it has a thousand million corners is believed by
    pycollada: here all corners together must have left room for their numbers in the file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.geometry: dict[str, int] = {}
        self.held: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.geometry_open: tuple[str, int] = ("", 0)
        self.controllers = 0
        self.corner_counts: list[str] | None = None
        self.corners = 0
        self.material: str | None = None
        self.bound: set[str] = set()
        self.colored: set[str] = set()

    @property
    def covered(self) -> bool:
        """Whether trimesh takes a material where the vertices have colours too."""
        return bool(self.bound & self.colored)

    def check(self, source: Source) -> None:
        """Read the file once.

        Raises:
            DataError: when it unfolds to more than is read, or refers to itself.
        """
        refuse_declarations(source.file, self.name, self._begin, self._end, self._said)
        if self.corners > source.size:
            raise DataError(
                f"{self.name} announces {self.corners:,} corners in {source.size} bytes; the file is broken"
            )
        counted: dict[str, tuple[int, int]] = {}
        nodes, size = self._count("", counted, ())
        if nodes > MAX_SHOWN_NODES or size > MAX_SHOWN_BYTES:
            raise DataError(
                f"{self.name} shows {nodes:,} nodes; its scene unfolds to more than is read: export it flat"
            )

    def _begin(self, name: str, attributes: dict[str, str], place: int) -> None:
        if name == "geometry":
            self.geometry_open = (attributes.get("id", ""), place)
        elif name == "node":
            identity = f"#{attributes.get('id', '')}#{place}"
            self.held.setdefault("".join(self.open[-1:]), []).append(identity)
            self.held.setdefault(f"#{attributes.get('id', '')}", []).append(identity)
            self.open.append(identity)
        elif name in ("instance_node", "instance_geometry") and self.open:
            self.held.setdefault(self.open[-1], []).append(attributes["url"])
        elif name == "instance_controller":
            self.controllers += 1
        elif name == "vcount":
            self.corner_counts = []
        elif name in PRIMITIVES:
            self.material = attributes.get("material")
        elif name == "input" and attributes.get("semantic") == "COLOR" and self.material is not None:
            self.colored.add(self.material)
        elif name == "instance_material":
            self.bound.add(attributes.get("symbol", ""))

    def _end(self, name: str, place: int) -> None:
        if name == "geometry":
            self.geometry[f"#{self.geometry_open[0]}"] = place - self.geometry_open[1]
        elif name == "node":
            self.open.pop()
        elif name == "vcount" and self.corner_counts is not None:
            self.corners += sum(abs(int(count)) for count in "".join(self.corner_counts).split())
            self.corner_counts = None
        elif name in PRIMITIVES:
            self.material = None

    def _said(self, text: str) -> None:
        if self.corner_counts is not None:
            self.corner_counts.append(text)

    def _count(self, identity: str, counted: dict[str, tuple[int, int]], above: tuple[str, ...]) -> tuple[int, int]:
        """How many nodes, and bytes of geometry, one node or reference shows."""
        if identity in counted:
            return counted[identity]
        if identity in above or len(above) > 500:
            raise DataError(f"{self.name} has a node that holds itself; the file is broken")
        nodes, size = 1, self.geometry.get(identity, 0)
        for inner in self.held.get(identity, []):
            more = self._count(inner, counted, (*above, identity))
            nodes, size = nodes + more[0], size + more[1]
        counted[identity] = (nodes, size)
        return counted[identity]
