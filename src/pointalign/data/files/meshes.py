"""Meshes as trimesh opens them: its scenes and materials as parts and paints, and points drawn from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import trimesh
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from pointalign.data.files.source import failures_told
from pointalign.data.files.surface import Paint, Part, plain_paint, sample_surface
from pointalign.data.files.textures import Pictures
from pointalign.errors import DataError

Mesh = trimesh.Trimesh | trimesh.Scene


def read_mesh(file: BinaryIO, file_type: str, resolver: Any, where: str) -> Mesh:
    """Open a mesh from a stream with trimesh.

    Args:
        file: the stream, at its start.
        file_type: extension without the dot, for instance "obj".
        resolver: finds the files that the mesh names (materials, textures), a `trimesh.resolvers` object.
        where: what to call the mesh in an error.

    Returns:
        A mesh, or a scene when the file holds several parts or materials. Vertices stay as the file has them.

    Raises:
        DataError: when the stream cannot be parsed or holds no faces.
    """
    with failures_told(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What numpy once only warned of: a list of numbers that ends in something else, cut off there.
        warnings.filterwarnings("error", message="string or file could not be read")
        mesh = trimesh.load(file, file_type=file_type, resolver=resolver, process=False)
    if not isinstance(mesh, (trimesh.Trimesh, trimesh.Scene)) or not mesh_parts(mesh):
        raise DataError(f"{where} holds no faces; give a mesh with a surface")
    return mesh


def mesh_parts(mesh: Mesh) -> list[tuple[trimesh.Trimesh, np.ndarray]]:
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


def sample_mesh(mesh_or_scene: Mesh, num_points: int, seed: int) -> np.ndarray:
    """Draw coloured points from a surface, uniformly by area; what is fully transparent is not drawn from.

    Args:
        mesh_or_scene: what `read_mesh` gives.
        num_points: how many, at least 1.
        seed: of numpy's default generator; the same mesh and seed give the same points.

    Returns:
        (num_points, 6) float32: xyz in the mesh's own units and axes, rgb (sRGB) in [0, 1].

    Raises:
        DataError: when num_points is below 1, or the surface has no area or coordinates that are not finite.
    """
    pictures = Pictures("the mesh")
    drawn = sample_surface(list(parts_of(mesh_or_scene, lambda visual: paint_of(visual, pictures))), num_points, seed)
    if drawn.left_out:
        raise DataError("the mesh has a surface without area or coordinates that are not finite; repair the mesh")
    return drawn.points.astype(np.float32)


def parts_of(mesh: Mesh, paint: Callable[[Any], Paint]) -> Iterator[Part]:
    """Parts as `sample_surface` takes them.

    Args:
        mesh: what `read_mesh` gives.
        paint: what a part's visual comes to.
    """
    for part, vertices in mesh_parts(mesh):
        yield Part(vertices, np.asarray(part.faces), paint(part.visual))


def paint_of(visual: Any, pictures: Pictures) -> Paint:
    """What a trimesh visual comes to: its material, else the colours of its vertices, else of its faces.

    Raises:
        DataError: when its texture is broken or too large.
    """
    paint = plain_paint()
    if isinstance(visual, TextureVisuals):
        _take_material(paint, visual, pictures)
    elif isinstance(visual, ColorVisuals) and visual.kind == "vertex":
        paint.corner_rgba, paint.colored = np.asarray(visual.vertex_colors), True
    elif isinstance(visual, ColorVisuals) and visual.kind == "face":
        paint.rgba, paint.colored = np.asarray(visual.face_colors) / 255.0, True
    return paint


def _take_material(paint: Paint, visual: TextureVisuals, pictures: Pictures) -> None:
    material: Any = visual.material
    paint.opacity, paint.colored = _opacity(material), True
    if isinstance(material, PBRMaterial):
        image, diffuse = material.baseColorTexture, material.baseColorFactor
    else:
        image, diffuse = getattr(material, "image", None), getattr(material, "diffuse", None)
    if diffuse is not None:
        paint.rgba = np.array([*np.asarray(diffuse)[:3] / 255.0, 1.0])
    if image is not None and visual.uv is not None and len(visual.uv):
        paint.texture = pictures.opened(image, f"of material {material.name!r}")
        paint.uv = np.nan_to_num(np.asarray(visual.uv, dtype=np.float64))


def _opacity(material: Any) -> float:
    """What a material says of its opacity: `d` of a Wavefront material, 1 where nothing is said."""
    settings = getattr(material, "kwargs", None) or {}
    try:
        return float(settings["d"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return 1.0
