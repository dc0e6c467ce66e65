"""Any 3D file as a coloured point cloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pointalign.data.files.arrays import read_npy, read_npz
from pointalign.data.files.cloud import PointCloud, turned_up
from pointalign.data.files.collada import read_dae
from pointalign.data.files.columns import Cloud, Column, Table, left_out, read_table, renamed
from pointalign.data.files.gltf import read_gltf
from pointalign.data.files.las import read_las
from pointalign.data.files.obj import read_obj
from pointalign.data.files.off import read_off
from pointalign.data.files.pcd import read_pcd
from pointalign.data.files.ply import is_mesh, read_header, read_ply_cloud
from pointalign.data.files.ply_mesh import read_ply_mesh
from pointalign.data.files.source import Source, failures_told, open_source, printable
from pointalign.data.files.stl import read_stl
from pointalign.data.files.surface import Surface, sample_surface
from pointalign.data.files.text import read_text
from pointalign.data.files.threemf import read_3mf
from pointalign.errors import DataError
from pointalign.geometry import farthest_point_sample

# How many points per wanted point farthest point sampling chooses from: drawn from a mesh, kept of a cloud.
DRAWN_PER_POINT = 4
KEPT_PER_POINT = 8
MAX_WANTED = 2**20
# A cloud this many times its own size away from the origin loses digits in float32 that its shape needs.
FAR_AWAY = 100

MESHES: dict[str, Callable[[Source], Surface]] = {
    "obj": read_obj,
    "stl": read_stl,
    "off": read_off,
    "glb": read_gltf,
    "gltf": read_gltf,
    "3mf": read_3mf,
    "dae": read_dae,
}
CLOUDS: dict[str, Callable[[Source], Table]] = {"las": read_las, "laz": read_las, "npz": read_npz}
# Those whose files name their columns as they like; the second argument asks for all of them.
NAMED_CLOUDS: dict[str, Callable[[Source, bool], Table]] = {"pcd": read_pcd, "npy": read_npy}


def load_point_cloud(
    path: str | Path,
    n_points: int = 8192,
    seed: int = 0,
    up: Literal["y", "z"] | None = None,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    color_max: float | None = None,
    unit: float | None = None,
) -> PointCloud:
    """Read any 3D file as a coloured point cloud; the same file and arguments give the same points.

    A mesh is sampled uniformly by area, then cut to `n_points` by farthest point sampling. A cloud of more points than
    KEPT_PER_POINT times `n_points` is thinned at random first; one of fewer than `n_points` stays as it is. Nothing is
    centred or scaled, but what lies so far from the origin that float32 would blur it is moved there.

    Args:
        path: the file, or "-" for standard input. Addresses are not fetched.
        n_points: how many points to give at most.
        seed: of every random choice.
        up: the file's axis that points up; z is turned to y, as the models are trained. None takes what the format
            fixes (glTF y, 3MF z, COLLADA as the file says) and y where it fixes nothing.
        format: one of `source.FORMATS`; by default the file's ending, or its first bytes.
        columns: names of a cloud's columns where they have none or wrong ones, for instance
            ("x", "y", "z", "nx", "ny", "nz"); "-" leaves one out.
        color_max: the colour value that means full, where the values do not tell.
        unit: of the file's coordinates in metres, for instance 0.001; 0 where it is not to be known. None takes what the
            format fixes (glTF 1) and leaves the size unknown where it fixes nothing.

    Raises:
        DataError: when the file is missing, broken, empty, too large, or what it holds cannot be told.
        MissingDependencyError: when a package is needed that reads the format.
    """
    if not 1 <= n_points <= MAX_WANTED:
        raise DataError(f"cannot give {n_points} points; ask for 1 to {MAX_WANTED:,}")
    if seed < 0:
        raise DataError(f"a seed is 0 or more, not {seed}")
    if up not in (None, "y", "z"):
        raise DataError(f"up is 'y' or 'z', not {up!r}")
    if unit is not None and not 0 <= unit < np.inf:
        raise DataError(f"the unit of coordinates is a number of metres, not {unit}; give 0.001 for millimetres")
    if color_max is not None and not 0 < color_max < np.inf:
        raise DataError(f"the colour value that means full is above 0, not {color_max}; give 255 for whole bytes")
    # Numbers that overflow are found by what they lead to.
    with open_source(path, format) as source, failures_told(source.name), np.errstate(all="ignore"):
        content = _read(source, columns)
        if isinstance(content, Surface):
            cloud = _from_surface(content, n_points, seed, source.name)
            axis, fixed = up or content.up, content.unit
        else:
            cloud = read_table(content, KEPT_PER_POINT * n_points, seed, source.name, color_max)
            axis, fixed = up, None
        return _finished(cloud, n_points, axis, fixed if unit is None else unit, source)


def _read(source: Source, columns: Sequence[str] | None) -> Surface | Table:
    if source.format in MESHES:
        return MESHES[source.format](source)
    named = columns is not None
    if source.format in NAMED_CLOUDS:
        table = NAMED_CLOUDS[source.format](source, named)
    elif source.format in CLOUDS:
        table = CLOUDS[source.format](source)
    elif source.format == "ply":
        header = read_header(source)
        if is_mesh(header):
            return read_ply_mesh(source, header)
        table = read_ply_cloud(source, header, named)
    else:
        return read_text(source, columns)
    return table if columns is None else renamed(table, columns, source.name)


def _from_surface(surface: Surface, n_points: int, seed: int, where: str) -> Cloud:
    """A mesh's points: drawn from its faces, or its vertices where it has no faces."""
    if not surface.parts:
        names = ["x", "y", "z", "red", "green", "blue"][: surface.points.shape[1]]
        notes = ("no faces: its vertices taken as a cloud", *surface.notes)
        table = Table(tuple(Column(name) for name in names), iter([surface.points]), notes)
        return read_table(table, KEPT_PER_POINT * n_points, seed, where)
    count = DRAWN_PER_POINT * n_points
    drawn = sample_surface(surface.parts, count, seed, where)
    faces = "1 face" if surface.num_faces == 1 else f"{surface.num_faces:,} faces"
    notes = [f"mesh of {faces}: {count:,} points drawn by area (seed {seed})", *surface.notes]
    if drawn.left_out:
        notes.append(left_out(drawn.left_out, "face", "coordinates"))
    colored = [part.paint.colored for part in surface.parts]
    if not any(colored):
        return Cloud(drawn.points[:, :3], None, [*notes, "no colours"])
    told = (
        "colours as the file gives them" if all(colored) else "colours as the file gives them, gray where it gives none"
    )
    return Cloud(drawn.points[:, :3], drawn.points[:, 3:], [*notes, told])


def _finished(cloud: Cloud, n_points: int, up: str | None, unit: float | None, source: Source) -> PointCloud:
    """Turn up what is up, keep the digits, and cut to the points that are spread best."""
    notes, xyz = list(cloud.notes), cloud.xyz
    if up == "z":
        xyz = turned_up(xyz)
        notes.append("z was up: turned so that y is")
    elif up is None:
        notes.append("y taken as up, for the format does not say; up='z' turns files with z up")
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    center, size = (low + high) / 2, float((high - low).max())
    if np.abs(center).max() > FAR_AWAY * size > 0:
        xyz = xyz - center
        notes.append("moved to the origin, from ({:g}, {:g}, {:g})".format(*center))
    points = xyz.astype(np.float32)
    if not np.isfinite(points).all():
        raise DataError(f"{source.name} has coordinates up to {np.abs(xyz).max():g}, beyond float32; rescale it")
    colors = None if cloud.rgb is None else cloud.rgb.clip(0, 1).astype(np.float32)
    if len(points) > n_points:
        chosen = farthest_point_sample(torch.from_numpy(points)[None], n_points)[0].numpy()
        points, colors = points[chosen], None if colors is None else colors[chosen]
        notes.append(f"cut to {n_points:,} by farthest point sampling")
    return PointCloud(points, colors, str(source.path or source.name), tuple(map(printable, notes)), unit or None)
