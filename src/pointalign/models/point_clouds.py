"""Clouds as a model takes them: checked, with colours, of a fixed number of points, in the unit ball."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pointalign.errors import DataError
from pointalign.geometry import cloud_radius, farthest_point_sample, normalize_point_cloud


@runtime_checkable
class ReadCloud(Protocol):
    """A cloud that was read from a file, `pointalign.PointCloud`: it knows whether it has colours, and its unit."""

    source: str

    def sized_array(self, missing_color: Sequence[float]) -> np.ndarray:
        """(N, 7): xyz, rgb and unit."""
        ...


def sample_cloud(cloud: Tensor, num_points: int) -> Tensor:
    """A clean cloud with as many points as a model reads, normalised.

    Args:
        cloud: (N, 6) or (N, 7) of `clean_cloud`.
        num_points: more points are cut down by farthest point sampling from point 0; fewer are filled up by repeating the
            cloud from its first point on.

    Returns:
        (num_points, 6 or 7), see `normalize_sized`.
    """
    if len(cloud) > num_points:
        cloud = cloud[farthest_point_sample(cloud[None, :, :3], num_points)[0]]
    elif len(cloud) < num_points:
        cloud = cloud[torch.arange(num_points) % len(cloud)]
    return normalize_sized(cloud)


def clean_cloud(points: Any, min_points: int, missing_color: Sequence[float], metric_size: bool) -> Tensor:
    """All points of one cloud, checked and with colours; see `PointAlignProcessor.clean_points`.

    Args:
        points: (N, 3), (N, 6) or (N, 7), or a `ReadCloud`, whose file is named in errors.
        min_points: fewest points that the cloud may have.
        missing_color: rgb in [0, 1] for a cloud without colour.
        metric_size: whether the unit is kept as a seventh column.

    Raises:
        DataError: when it is no such cloud.
    """
    if isinstance(points, ReadCloud):
        try:
            return clean_cloud(points.sized_array(missing_color), min_points, missing_color, metric_size)
        except DataError as error:
            raise DataError(f"{points.source}: {error}") from error
    cloud = points if isinstance(points, Tensor) else torch.from_numpy(_as_array(points))
    if cloud.ndim != 2 or cloud.shape[1] not in (3, 6, 7):
        raise DataError(
            f"a point cloud has shape (points, 3) or (points, 6), xyz and rgb; this one has {tuple(cloud.shape)}"
        )
    cloud = cloud.detach().to("cpu", torch.float32)
    if len(cloud) < min_points:
        raise DataError(f"the cloud has {len(cloud)} points; this model needs at least {min_points}")
    bad_rows = (~cloud.isfinite()).any(dim=1).nonzero().flatten()
    if len(bad_rows):
        raise DataError(
            f"{len(bad_rows)} of {len(cloud)} points hold NaN or infinite values (first: row {int(bad_rows[0])}); "
            "remove them"
        )
    unit = cloud[:, 6:] if cloud.shape[1] == 7 else torch.zeros(len(cloud), 1)
    if (unit != unit[0]).any() or unit[0] < 0:
        raise DataError("the seventh column is the unit of xyz in metres, one positive number in every row (or 0)")
    columns = [cloud[:, :3], _colors(cloud[:, :6], missing_color)]
    return torch.cat([*columns, unit] if metric_size else columns, dim=1)


def _colors(cloud: Tensor, missing_color: Sequence[float]) -> Tensor:
    if cloud.shape[1] == 3:
        return torch.tensor(list(missing_color)).expand(len(cloud), 3)
    colors = cloud[:, 3:]
    low, high = float(colors.min()), float(colors.max())
    if low < 0 or high > 255 or 1 < high < 2:
        raise DataError(f"colours lie between {low:g} and {high:g}; give rgb in [0, 1] (or 0-255)")
    if high > 1:
        warnings.warn(f"colours up to {high:g} are taken as 0-255 and divided by 255", stacklevel=6)
        colors = colors / 255
    return colors


def normalize_sized(cloud: Tensor) -> Tensor:
    """`normalize_point_cloud`; a seventh column, the unit of xyz in metres, becomes the cloud's radius in metres.

    Args:
        cloud: (N, 6) or (N, 7).
    """
    normalized = normalize_point_cloud(cloud)
    if cloud.shape[1] == 7:
        normalized[:, 6] *= cloud_radius(cloud)
    return normalized


def _as_array(points: Any) -> np.ndarray:
    """A copy that torch can share: native byte order, no negative strides, writable."""
    try:
        with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as such
            return np.array(points, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a point cloud is an array of numbers of shape (points, 3) or (points, 6); this {type(points).__name__} is "
            f"not ({str(error).splitlines()[0]})"
        ) from error
