""".glb and .gltf files: the scene's triangles where it shows them, in the colours that its materials give.

A reader of our own: trimesh leaves sparse accessors at zero, reads normalised texture coordinates as whole numbers, knows
neither texture transforms nor alpha modes nor skins, keeps colour factors in 8 linear bits, and loses textures in silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pointalign.data.files.gltf_document import Document
from pointalign.data.files.polygons import checked_faces
from pointalign.data.files.source import MAX_PARTS, Source
from pointalign.data.files.surface import REPEAT, VISIBLE_OPACITY, Paint, Part, Surface, plain_paint, to_srgb
from pointalign.data.files.textures import Companions, Pictures
from pointalign.errors import DataError

POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6
GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
TRANSFORM = "KHR_texture_transform"
# Extensions of nodes that change what is shown.
UNREAD_OF_NODES = {
    "EXT_mesh_gpu_instancing": "one of its copies is taken, where the node stands",
    "KHR_node_visibility": "hidden nodes are taken too",
}


def read_gltf(source: Source) -> Surface:
    """Read a .glb or .gltf: its default scene, in rest pose.

    Colour is base colour texture times base colour factor times vertex colour, as sRGB; emission is not light here.

    Raises:
        DataError: when it is broken, too large, or requires what is not read.

    Source: glTF 2.0 specification (Khronos), sections 3.5 (scenes), 3.7 (meshes, skins) and 3.9 (materials).
    """
    return _Reader(source).read()


class _Reader:
    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.companions, self.pictures = Companions(source), Pictures(source.name)
        self.document = Document(source, self.companions)
        self.surface = Surface(up="y", unit=1.0)
        self.points: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.skipped = 0

    def read(self) -> Surface:
        worlds = self._worlds()
        nodes = {index: self.document.item("nodes", index) for index in self._shown(worlds)}
        pieces = {
            index: self.document.item("meshes", node["mesh"])["primitives"]
            for index, node in nodes.items()
            if "mesh" in node
        }
        if sum(map(len, pieces.values())) > MAX_PARTS:
            raise DataError(f"{self.name} shows more than {MAX_PARTS:,} pieces; join them")
        for index, primitives in pieces.items():
            for primitive in primitives:
                self._primitive(primitive, nodes[index], worlds, index)
        if self.points and not self.surface.parts:
            self.surface.points = _joined(self.points)
        elif self.points:
            self.surface.notes.append("points beside the triangles were left out")
        if self.skipped:
            self.surface.notes.append(f"{self.skipped} pieces made of lines were left out")
        self._note_unread(nodes)
        self.surface.notes += [*self.companions.notes, *self.pictures.notes]
        return self.surface

    def _note_unread(self, nodes: dict[int, Any]) -> None:
        """Say what shapes the scene and is not read."""
        meshes = [self.document.item("meshes", node["mesh"]) for node in nodes.values() if "mesh" in node]
        if any(any(thing.get("weights", ())) for thing in (*meshes, *nodes.values())):
            self.surface.notes.append("morph targets are not read: shapes are as without them")
        extensions = {name for node in nodes.values() for name in node.get("extensions", {})}
        for name, told in UNREAD_OF_NODES.items():
            if name in extensions:
                self.surface.notes.append(f"{name} is not read: {told}")

    def _worlds(self) -> dict[int, np.ndarray]:
        """Each node's (4, 4) transform to the world, from the roots down."""
        nodes = self.document.json.get("nodes", [])
        parents: dict[int, int] = {}
        for index in range(len(nodes)):
            for child in self.document.item("nodes", index).get("children", []):
                self.document.item("nodes", child)
                if child in parents:
                    raise DataError(f"{self.name} has a node with two parents, {child}; the file is broken")
                parents[child] = index
        worlds = {
            i: self.document.matrix(self.document.item("nodes", i)) for i in range(len(nodes)) if i not in parents
        }
        waiting = list(worlds)
        while waiting:
            index = waiting.pop()
            for child in self.document.item("nodes", index).get("children", []):
                worlds[child] = worlds[index] @ self.document.matrix(self.document.item("nodes", child))
                waiting.append(child)
        return worlds

    def _shown(self, worlds: dict[int, np.ndarray]) -> list[int]:
        """Nodes of the default scene in the order of the file; without scenes, all of them."""
        if not self.document.json.get("scenes"):
            return sorted(worlds)
        waiting = list(self.document.item("scenes", self.document.json.get("scene", 0)).get("nodes", []))
        shown: set[int] = set()
        while waiting:
            index = waiting.pop()
            node = self.document.item("nodes", index)
            if index in shown or index not in worlds:
                raise DataError(f"{self.name} shows node {index} twice or in a circle; the file is broken")
            shown.add(index)
            waiting.extend(node.get("children", []))
        return sorted(shown)

    def _primitive(self, primitive: Any, node: Any, worlds: dict[int, np.ndarray], index: int) -> None:
        mode, attributes = primitive.get("mode", TRIANGLES), primitive["attributes"]
        if mode not in (POINTS, TRIANGLES, STRIP, FAN):
            self.skipped += 1
            return
        if "POSITION" not in attributes:
            return
        vertices = self._placed(attributes, node, worlds, index)
        colors = self._vertex_colors(attributes, len(vertices))
        if mode == POINTS:
            rgb = None if colors is None else to_srgb(colors[:, :3] / (255 if colors.dtype == np.uint8 else 1.0))
            self.points.append((vertices, rgb))
            return
        count = len(vertices)
        indices = np.arange(count) if "indices" not in primitive else self.document.accessor(primitive["indices"])[:, 0]
        faces = checked_faces(_triangles(indices, mode, self.name), count, self.name)
        paint = self._paint(primitive, attributes, count)
        if colors is not None:
            paint.corner_rgba, paint.colored, paint.linear = colors, True, True
        self.surface.add(Part(vertices, faces, paint), self.name)

    def _placed(self, attributes: Any, node: Any, worlds: dict[int, np.ndarray], index: int) -> np.ndarray:
        """Vertices (V, 3) in the world: by the node's transform, or by the joints of its skin."""
        stored, world = self.document.accessor(attributes["POSITION"]), worlds[index]
        if stored.shape[1] != 3:
            raise DataError(f"{self.name} has positions of {stored.shape[1]} numbers; the file is broken")
        if "skin" not in node and stored.dtype.kind == "f" and (world == np.eye(4)).all():
            return stored
        positions = self.document.fractions(attributes["POSITION"])
        if "skin" not in node or "JOINTS_0" not in attributes or "WEIGHTS_0" not in attributes:
            return positions @ world[:3, :3].T + world[:3, 3]
        skin = self.document.item("skins", node["skin"])
        joints = np.stack([worlds[joint] for joint in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self.document.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
            joints = joints @ inverse[: len(joints)]
        which = self.document.accessor(attributes["JOINTS_0"]).astype(np.int64)
        weights = self.document.fractions(attributes["WEIGHTS_0"])
        if which.shape != (len(positions), 4) or weights.shape != which.shape or which.max(initial=0) >= len(joints):
            raise DataError(f"{self.name} has a skin that does not fit its mesh; the file is broken")
        placed = np.zeros_like(positions)
        for corner in range(4):
            matrices = joints[which[:, corner]]
            moved = np.einsum("nij,nj->ni", matrices[:, :3, :3], positions) + matrices[:, :3, 3]
            placed += weights[:, corner, None] * moved
        return placed

    def _vertex_colors(self, attributes: Any, count: int) -> np.ndarray | None:
        """(V, 4) linear RGBA: uint8, or float32 in [0, 1]."""
        if "COLOR_0" not in attributes:
            return None
        colors = self.document.accessor(attributes["COLOR_0"])
        if len(colors) != count or colors.shape[1] not in (3, 4):
            raise DataError(f"{self.name} has vertex colours that do not fit its vertices; the file is broken")
        if colors.dtype == np.uint8:
            return colors if colors.shape[1] == 4 else np.insert(colors, 3, 255, axis=1)
        scale = np.iinfo(colors.dtype).max if colors.dtype.kind in "iu" else 1
        colors = np.nan_to_num(colors / np.float32(scale)).clip(0, 1)
        return colors if colors.shape[1] == 4 else np.insert(colors, 3, 1, axis=1)

    def _paint(self, primitive: Any, attributes: Any, count: int) -> Paint:
        if "material" not in primitive:
            paint = plain_paint()
            paint.rgba = np.ones(4) if "COLOR_0" in attributes else paint.rgba
            return paint
        material = self.document.item("materials", primitive["material"])
        glossy = material.get("extensions", {}).get(GLOSSINESS)
        base = material.get("pbrMetallicRoughness", {}) if glossy is None else glossy
        names = ("baseColorFactor", "baseColorTexture") if glossy is None else ("diffuseFactor", "diffuseTexture")
        rgba = np.asarray(base.get(names[0], (1, 1, 1, 1)), dtype=np.float64).reshape(4)
        if not np.isfinite(rgba).all():
            raise DataError(f"{self.name} has a colour that is not finite; the file is broken")
        paint = Paint(rgba.clip(0, 1), linear=True)
        mode = material.get("alphaMode", "OPAQUE")
        paint.opaque = mode == "OPAQUE"
        paint.cutoff = float(material.get("alphaCutoff", 0.5)) if mode == "MASK" else VISIBLE_OPACITY
        paint.opacity = 1.0 if paint.opaque or mode == "MASK" else float(paint.rgba[3])
        if names[1] in base:
            self._texture(paint, base[names[1]], attributes, count)
        return paint

    def _texture(self, paint: Paint, info: Any, attributes: Any, count: int) -> None:
        transform = info.get("extensions", {}).get(TRANSFORM, {})
        number = transform.get("texCoord", info.get("texCoord", 0))
        if f"TEXCOORD_{number}" not in attributes:
            return
        texture = self.document.item("textures", info["index"])
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {}).get("source")
        image = texture.get("source") if webp is None else webp
        if image is None:
            self.pictures.notes.append("a texture of a kind that is not read was left out")
            return
        paint.texture = self._image(image)
        if paint.texture is None:
            return
        uv = self.document.fractions(attributes[f"TEXCOORD_{number}"])
        if uv.shape != (count, 2):
            raise DataError(f"{self.name} has texture coordinates that do not fit its vertices; the file is broken")
        uv = np.nan_to_num(uv) * np.asarray(transform.get("scale", (1, 1)), dtype=np.float64).reshape(2)
        turn = float(transform.get("rotation", 0))
        uv = uv @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        uv += np.asarray(transform.get("offset", (0, 0)), dtype=np.float64).reshape(2)
        uv[:, 1] = 1 - uv[:, 1]  # glTF's v points down
        paint.uv = uv
        if "sampler" in texture:
            sampler = self.document.item("samplers", texture["sampler"])
            paint.wrap = (sampler.get("wrapS", REPEAT), sampler.get("wrapT", REPEAT))

    def _image(self, index: object) -> np.ndarray | None:
        image = self.document.item("images", index)
        name = str(image.get("name") or f"image {index}")[:60]
        data = self.document.view(image["bufferView"])[0] if "bufferView" in image else None
        if data is None:
            data = self.document.uri_bytes(image["uri"])
        return None if data is None else self.pictures.decode(bytes(data), f"{index}: {name}")


def _joined(clouds: list[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray:
    """Clouds as one, (N, 6), or (N, 3) unless all have colours."""
    xyz = np.concatenate([points for points, _ in clouds])
    rgb = [colors for _, colors in clouds if colors is not None]
    return np.concatenate([xyz, np.concatenate(rgb)], axis=1) if len(rgb) == len(clouds) else xyz


def _triangles(indices: np.ndarray, mode: int, where: str) -> np.ndarray:
    """Faces (F, 3) from a list of vertex numbers."""
    if mode == TRIANGLES:
        if len(indices) % 3:
            raise DataError(f"{where} has triangles of {len(indices)} corners in all; the file is broken")
        return indices.reshape(-1, 3)
    if len(indices) < 3:
        return np.empty((0, 3), dtype=np.int64)
    if mode == FAN:
        return np.stack([np.broadcast_to(indices[0], len(indices) - 2), indices[1:-1], indices[2:]], axis=1)
    return np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
