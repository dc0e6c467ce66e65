"""3D files to coloured point clouds: open a mesh with its materials, and sample its surface.

Colours follow the material that a face wears: its texture read through the face's UV, else its diffuse colour, else the
colours stored on faces or vertices. A scene keeps its transforms, and each of its parts its own material.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import trimesh
from trimesh.resolvers import FilePathResolver
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from pointalign.errors import DataError

MESH_FORMATS = (".obj", ".ply", ".glb", ".gltf", ".stl", ".off")
UNCOLORED = (0.5, 0.5, 0.5)
# Below this opacity a surface is not seen at all: the empty part of a leaf's texture, a material that hides a helper
# part. Window glass is clearly above it.
VISIBLE_OPACITY = 0.1
REDRAWS = 32


def load_mesh(path: str | Path) -> trimesh.Trimesh | trimesh.Scene:
    """Open a 3D file with its materials and textures.

    Args:
        path: a file ending in one of MESH_FORMATS; materials and textures are looked up beside it.

    Returns:
        A mesh, or a scene when the file holds several parts or materials. Vertices stay as the file has them.

    Raises:
        DataError: when the file is missing, of an unknown format, broken, or holds no faces.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no 3D file at {path}; check the path")
    if path.suffix.lower() not in MESH_FORMATS:
        raise DataError(f"cannot read {path.name}: format {path.suffix!r} is not one of {', '.join(MESH_FORMATS)}")
    with path.open("rb") as file:
        resolver = FilePathResolver(str(path))
        return read_mesh(file, path.suffix.lower().lstrip("."), resolver, str(path))


def read_mesh(file: BinaryIO, file_type: str, resolver: Any, where: str) -> trimesh.Trimesh | trimesh.Scene:
    """Open a mesh from a stream, as `load_mesh` does from a path.

    Args:
        file: the stream, at its start.
        file_type: extension without the dot, for instance "obj".
        resolver: finds the files that the mesh names (materials, textures), a `trimesh.resolvers` object.
        where: what to call the mesh in an error.

    Raises:
        DataError: when the stream cannot be parsed or holds no faces.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mesh = trimesh.load(file, file_type=file_type, resolver=resolver, process=False)
    except Exception as error:
        raise DataError(f"cannot read {where}: {_reason(error)}; the file is broken or cut short") from error
    if not isinstance(mesh, (trimesh.Trimesh, trimesh.Scene)) or not mesh_parts(mesh):
        raise DataError(f"{where} holds no faces; give a mesh with a surface")
    return mesh


def mesh_parts(mesh: trimesh.Trimesh | trimesh.Scene) -> list[tuple[trimesh.Trimesh, np.ndarray]]:
    """The parts of a mesh or scene, each with its vertices (V, 3) moved to where the scene shows them."""
    if isinstance(mesh, trimesh.Trimesh):
        return [(mesh, np.asarray(mesh.vertices))] if len(mesh.faces) else []
    parts = []
    for node in mesh.graph.nodes_geometry:
        transform, name = mesh.graph[node]
        part = mesh.geometry[name]
        if isinstance(part, trimesh.Trimesh) and len(part.faces):
            parts.append((part, np.asarray(part.vertices) @ transform[:3, :3].T + transform[:3, 3]))
    return parts


def sample_mesh(mesh_or_scene: trimesh.Trimesh | trimesh.Scene, num_points: int, seed: int) -> np.ndarray:
    """Draw coloured points from a surface, uniformly by area; what is fully transparent is not drawn from.

    Args:
        mesh_or_scene: what `load_mesh` gives.
        num_points: how many, at least 1.
        seed: of numpy's default generator; the same mesh and seed give the same points.

    Returns:
        (num_points, 6) float32: xyz in the mesh's own units and axes, rgb (sRGB) in [0, 1].

    Raises:
        DataError: when num_points is below 1, or the surface has no area or coordinates that are not finite.
    """
    if num_points < 1:
        raise DataError(f"cannot sample {num_points} points; ask for at least 1")
    parts = mesh_parts(mesh_or_scene)
    if not parts:
        raise DataError("the mesh holds no faces; give a mesh with a surface")
    triangles = [vertices[part.faces] for part, vertices in parts]
    areas = [_areas(t) for t in triangles]
    seen = [a * (_opacity(part) >= VISIBLE_OPACITY) for a, (part, _) in zip(areas, parts, strict=True)]
    weights = np.concatenate(seen if sum(a.sum() for a in seen) > 0 else areas)
    if not np.isfinite(weights).all() or weights.sum() <= 0:
        raise DataError("the mesh's surface has no area or coordinates that are not finite; repair the mesh")
    painters = [_Painter(part) for part, _ in parts]
    starts = np.cumsum([0, *(len(a) for a in areas)])
    corners = np.concatenate(triangles)
    rng = np.random.default_rng(seed)
    points, opaque = _draw(rng, num_points, weights, corners, starts, painters)
    for _ in range(REDRAWS):
        if opaque.all():
            break
        holes = np.flatnonzero(~opaque)
        points[holes], opaque[holes] = _draw(rng, len(holes), weights, corners, starts, painters)
    return points.astype(np.float32)


def _draw(
    rng: np.random.Generator,
    count: int,
    weights: np.ndarray,
    corners: np.ndarray,
    starts: np.ndarray,
    painters: list[_Painter],
) -> tuple[np.ndarray, np.ndarray]:
    """One draw: points (count, 6) and whether each lies on something that can be seen (count,)."""
    ends = np.cumsum(weights)
    faces = np.searchsorted(ends, rng.random(count) * ends[-1], side="right").clip(max=len(weights) - 1)
    # The square root makes it uniform in the triangle. Source: Osada et al. 2002, "Shape Distributions", equation 1.
    root, along = np.sqrt(rng.random(count)), rng.random(count)
    bary = np.stack([1 - root, root * (1 - along), root * along], axis=1)
    points = np.empty((count, 6))
    points[:, :3] = np.einsum("nk,nkd->nd", bary, corners[faces])
    opaque = np.ones(count, dtype=bool)
    owners = np.searchsorted(starts, faces, side="right") - 1
    for owner in np.unique(owners):
        mine = owners == owner
        rgba = painters[owner].colors(faces[mine] - starts[owner], bary[mine])
        points[mine, 3:] = rgba[:, :3]
        opaque[mine] = rgba[:, 3] >= VISIBLE_OPACITY
    return points, opaque


class _Painter:
    """Gives the RGBA of any place on one part's surface."""

    def __init__(self, part: trimesh.Trimesh) -> None:
        self.faces = np.asarray(part.faces)
        self.texture: np.ndarray | None = None
        self.uv: np.ndarray | None = None
        self.by_vertex: np.ndarray | None = None
        self.by_face = np.tile([*UNCOLORED, 1.0], (len(self.faces), 1))
        visual: Any = part.visual
        if isinstance(visual, TextureVisuals):
            self._take_material(visual)
        elif isinstance(visual, ColorVisuals) and visual.kind == "vertex":
            self.by_vertex = np.asarray(visual.vertex_colors) / 255.0
        elif isinstance(visual, ColorVisuals) and visual.kind == "face":
            self.by_face = np.asarray(visual.face_colors) / 255.0

    def _take_material(self, visual: TextureVisuals) -> None:
        material: Any = visual.material
        if isinstance(material, PBRMaterial):
            image, diffuse = material.baseColorTexture, material.baseColorFactor
        else:
            image, diffuse = getattr(material, "image", None), getattr(material, "diffuse", None)
        if diffuse is not None:
            self.by_face[:, :3] = np.asarray(diffuse)[:3] / 255.0
        if image is not None and visual.uv is not None and len(visual.uv):
            try:
                self.texture = np.asarray(image.convert("RGBA"))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"the texture of material {material.name!r} is broken: {_reason(error)}") from error
            self.uv = np.nan_to_num(np.asarray(visual.uv, dtype=np.float64))

    def colors(self, faces: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """(n, 4) RGBA in [0, 1] at barycentric places (n, 3) of faces (n,)."""
        if self.texture is not None and self.uv is not None:
            u, v = np.einsum("nk,nkd->dn", bary, self.uv[self.faces[faces]])
            height, width = self.texture.shape[:2]
            column = np.floor(u * width).astype(np.int64) % width
            row = np.floor((1 - v) * height).astype(np.int64) % height
            return self.texture[row, column] / 255.0
        if self.by_vertex is not None:
            return np.einsum("nk,nkd->nd", bary, self.by_vertex[self.faces[faces]])
        return self.by_face[faces]


def _opacity(part: trimesh.Trimesh) -> float:
    """What the material says of its opacity: `d` of a Wavefront material, 1 where nothing is said."""
    settings = getattr(getattr(part.visual, "material", None), "kwargs", None) or {}
    try:
        return float(settings["d"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return 1.0


def _areas(triangles: np.ndarray) -> np.ndarray:
    """Areas (F,) of triangles (F, 3, 3)."""
    edges = triangles[:, 1:] - triangles[:, :1]
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind when it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
