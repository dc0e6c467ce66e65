"""Pictures of one cloud as the model sees it: several views, drawn without a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.spatial import KDTree

from pointalign.data.files import load_point_cloud
from pointalign.data.files.source import printable
from pointalign.errors import ConfigError
from pointalign.figures import save_figure
from pointalign.geometry import normalize_point_cloud
from pointalign.models.processing import load_processor

# Where each view looks from, in degrees: around the upright axis from the front, and above the ground.
VIEWS = {
    "from front right": (35, 22),
    "front": (0, 0),
    "right side": (90, 0),
    "top": (0, 90),
    "from back left": (215, 22),
}
PIXELS = 1000
MARGIN = 1.06
SMALLEST_REACH = 1e-6
# Of a ball: its radius over the distance of neighbours, in pixels, and over the picture's side.
SPACING_SHARE = 0.85
MIN_RADIUS = 1.5
MAX_RADIUS_SHARE = 1 / 60
# What a cloud without colour is drawn in: shading does not show on black.
NEUTRAL = 0.6
# Black is drawn as a dark gray, for the same reason.
LIFT = 0.1
DEFAULT_POINTS = 8192


def render_file(
    file: str,
    out: Path,
    num_points: int | None = None,
    model: str | None = None,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw a 3D file as a model sees it.

    Args:
        file: the 3D file, or "-" for standard input.
        out: PNG to write.
        num_points: of the cloud; the model's, else DEFAULT_POINTS, when None.
        model: folder or Hub id of the model whose number of points and missing colour are taken.
        reading: further arguments of `load_point_cloud`.

    Returns:
        What was drawn: out, points, whether the file has colours, notes.

    Raises:
        DataError: when the file cannot be read.
        CheckpointError: when the model has no processor.
        ConfigError: when `out` does not end in .png.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"cannot draw into {str(out)!r}: pictures are PNGs; name a file that ends in .png")
    processor = load_processor(model) if model is not None else None
    if num_points is None:
        num_points = processor.num_points if processor else DEFAULT_POINTS
    cloud = load_point_cloud(file, n_points=num_points, **(reading or {}))
    notes = list(cloud.notes)
    if cloud.colors is None and processor is not None:
        notes = list(cloud.filled(processor.missing_color).notes)
    draw_views(cloud.points, cloud.colors, out, title=printable(Path(cloud.source).name), caption="; ".join(notes))
    return {"out": str(out), "points": len(cloud), "colored": cloud.colors is not None, "notes": notes}


def draw_views(points: np.ndarray, colors: np.ndarray | None, path: Path, title: str, caption: str = "") -> None:
    """Draw a cloud from five sides into one picture; it is centred and scaled as the processor does it.

    Args:
        points: (N, 3) xyz, y up.
        colors: (N, 3) rgb in [0, 1]; gray when None.
        path: PNG to write.
        title: of the picture.
        caption: stands below it.
    """
    xyz = normalize_point_cloud(torch.from_numpy(np.asarray(points, dtype=np.float64))).numpy()
    rgb = np.full(xyz.shape, NEUTRAL) if colors is None else LIFT + (1 - LIFT) * np.asarray(colors, dtype=np.float64)
    lines = textwrap.wrap(caption, 150)[:4]
    figure = Figure(figsize=(12, 6.4 + 0.17 * len(lines)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.supxlabel("\n".join(lines), fontsize=7.5, color="0.35", parse_math=False)
    panels = figure.subplot_mosaic([[0, 0, 1, 2], [0, 0, 3, 4]])
    size = ball_size(xyz)
    seen = {name: _centered(xyz @ looking(*angles).T) for name, angles in VIEWS.items()}
    reach = MARGIN * max(float(np.abs(view[:, :2]).max()) for view in seen.values())
    for axes, (name, view) in zip(panels.values(), seen.items(), strict=True):
        axes.imshow(splat(view, rgb, max(reach, SMALLEST_REACH), PIXELS, size))
        axes.set_title(name, fontsize=9, color="0.35", pad=2)
        axes.set_axis_off()
    save_figure(figure, path)


def looking(around: float, above: float) -> np.ndarray:
    """Axes of a view as rows of a (3, 3) array: to the right, up, and toward the one who looks.

    Args:
        around: degrees around the upright axis, 0 is the front (from +z), 90 the right side (from +x).
        above: degrees above the ground.
    """
    turn, tilt = np.deg2rad(around), np.deg2rad(above)
    right = np.array([np.cos(turn), 0, -np.sin(turn)])
    toward = np.array([np.sin(turn) * np.cos(tilt), np.sin(tilt), np.cos(turn) * np.cos(tilt)])
    return np.stack([right, np.cross(toward, right), toward])


def _centered(seen: np.ndarray) -> np.ndarray:
    """The same view (N, 3) with the middle of the cloud's box in the middle."""
    return seen - (seen.min(axis=0) + seen.max(axis=0)) / 2


def splat(seen: np.ndarray, rgb: np.ndarray, reach: float, pixels: int, size: float) -> np.ndarray:
    """One view of a cloud: a small ball for each point, the nearer in front, darker where something stands before it.

    Args:
        seen: (N, 3) how far right, up and near each point is.
        rgb: (N, 3) in [0, 1].
        reach: how far right and up the picture reaches, from the middle.
        pixels: of each side of the picture.
        size: radius of a ball; drawn no smaller than can be seen and no larger than is readable.

    Returns:
        (pixels, pixels, 3) in [0, 1] on white.
    """
    scale = pixels / (2 * reach)
    radius = float(np.clip(size * scale, MIN_RADIUS, pixels * MAX_RADIUS_SHARE))
    span = np.arange(-int(radius), int(radius) + 1)
    over, down = (side.ravel() for side in np.meshgrid(span, span))
    rise = np.sqrt((radius**2 - over**2 - down**2).clip(0))
    over, down, rise = over[rise > 0], down[rise > 0], rise[rise > 0]
    columns = np.floor((seen[:, :1] + reach) * scale).astype(int) + over
    rows = np.floor((reach - seen[:, 1:2]) * scale).astype(int) + down
    places = (rows.clip(0, pixels - 1) * pixels + columns.clip(0, pixels - 1)).ravel()
    depths = (seen[:, 2:] + rise / scale).ravel()
    order = np.argsort(depths, kind="stable")
    depth, owner = np.full(pixels * pixels, -np.inf), np.full(pixels * pixels, -1)
    # Of several balls at one place the last one stays, which is the nearest.
    depth[places[order]] = depths[order]
    owner[places[order]] = order
    there = owner >= 0
    point, part = np.divmod(owner[there], len(rise))
    light = shade(depth.reshape(pixels, pixels), radius / scale).ravel()[there] * (0.7 + 0.3 * rise[part] / radius)
    image = np.ones((pixels * pixels, 3))
    image[there] = rgb[point] * light[:, None]
    return image.reshape(pixels, pixels, 3)


def ball_size(xyz: np.ndarray) -> float:
    """Radius at which the balls of a cloud (N, 3) mostly close its surface: a share of the usual distance to the next."""
    distances = KDTree(xyz).query(xyz, k=2)[0][:, 1]
    apart = distances[(distances > 0) & np.isfinite(distances)]
    return SPACING_SHARE * float(np.median(apart)) if len(apart) else 0.0


def shade(depth: np.ndarray, size: float, strength: float = 0.35) -> np.ndarray:
    """Light in (0, 1] of each pixel: less where the pixels around are nearer.

    Args:
        depth: (H, W) nearness, -inf where there is nothing.
        size: what counts as a step of one.
        strength: of the shading.

    Source: Boucheny 2009, eye-dome lighting (PhD thesis, Universite Joseph Fourier, Grenoble).
    """
    light = np.zeros(depth.shape)
    floor = np.where(np.isfinite(depth), depth, -1e9)
    for reach in (2, 5):
        wide = np.pad(floor, reach, constant_values=-1e9)
        for right, down in ((reach, 0), (-reach, 0), (0, reach), (0, -reach)):
            beside = wide[reach + down : reach + down + len(depth), reach + right : reach + right + depth.shape[1]]
            light += ((beside - floor) / size).clip(0, 4) / 8
    return 0.25 + 0.75 * np.exp(-strength * light)
