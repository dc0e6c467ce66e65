"""Pure tensor functions on point clouds: normalise, farthest point sampling, nearest neighbours, grouping.

Letters: B batch, N points, G groups, K neighbours. Points hold xyz in their first three columns; what follows (colour)
is carried along. Everything is deterministic: sampling starts at point 0 unless told otherwise.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from pointalign.cpu_geometry import farthest_points, nearest_points
from pointalign.errors import DataError

# Distances between queries and points that an accelerator holds at a time: half a GiB.
DISTANCES_AT_ONCE = 1 << 27
# Distances between points that chamfer_distances holds at a time.
PAIRS_AT_ONCE = 1 << 20


def normalize_point_cloud(points: Tensor) -> Tensor:
    """Centre xyz on its mean and scale it into the unit ball; other columns stay as they are.

    A cloud whose points all coincide becomes all zeros.

    Args:
        points: (..., N, C) with C >= 3 and N >= 1, finite.

    Returns:
        A new tensor of the same shape and dtype; the farthest point lies at distance 1 from the origin.

    Source: PointLLM (arXiv 2308.16911), the preprocessing that PointAlign's input inherits.
    """
    xyz = _centered(points)
    radius = xyz.norm(dim=-1).amax(dim=-1, keepdim=True).unsqueeze(-1)
    xyz = xyz / torch.where(radius > 0, radius, torch.ones_like(radius))
    return torch.cat([xyz, points[..., 3:]], dim=-1)


def cloud_radius(points: Tensor) -> Tensor:
    """What `normalize_point_cloud` divides by: how far the farthest point lies from the mean; (..., N, C) to (...)."""
    return _centered(points).norm(dim=-1).amax(dim=-1)


def _centered(points: Tensor) -> Tensor:
    # Seen from its first point, a cloud of coinciding points is exactly zero, and a far-off cloud keeps its digits.
    xyz = points[..., :3] - points[..., :1, :3]
    return xyz - xyz.mean(dim=-2, keepdim=True)


def farthest_point_sample(xyz: Tensor, num_samples: int, start: int = 0) -> Tensor:
    """Choose points one by one, each the farthest from those already chosen.

    Any prefix of the result is itself a farthest point sample. No point is chosen twice, also when points coincide;
    of equally far points the one with the lowest index is taken.

    Args:
        xyz: (B, N, 3) coordinates.
        num_samples: how many to choose, 1 <= num_samples <= N.
        start: index of the first chosen point. The released code starts at a random point, so that the same cloud
            gives different tokens each time; a fixed start makes the encoder a function of the cloud.

    Returns:
        (B, num_samples) int64 indices into N, in the order of choice.

    Raises:
        DataError: when num_samples is not between 1 and N.

    Source: Eldar et al. 1997, "The farthest point strategy"; grouping step of Point-BERT (arXiv 2111.14819), section 3.1.
    """
    count = xyz.shape[1]
    if not 1 <= num_samples <= count:
        raise DataError(f"cannot choose {num_samples} farthest points from a cloud of {count}; give a larger cloud")
    if xyz.device.type == "cpu":
        exact = xyz.detach() if xyz.dtype == torch.float64 else xyz.detach().float()
        return torch.from_numpy(farthest_points(exact.numpy(), num_samples, start))
    if xyz.dtype == torch.float32 and kernel_runs(xyz.device):
        from pointalign.kernels import choose_farthest

        return choose_farthest(xyz, num_samples, start)
    return _farthest_in_steps(xyz, num_samples, start)


@functools.cache
def kernel_runs(device: torch.device) -> bool:
    """Whether Triton is there and works on the device, tried out once."""
    if device.type != "cuda":
        return False
    try:
        from pointalign.kernels import choose_farthest, choose_nearest

        line = torch.arange(5.0, device=device).view(1, 5, 1).expand(-1, -1, 3)
        near = choose_nearest(line[:, 3:], line, 2).tolist()
        return choose_farthest(line, 3, 1).tolist() == [[1, 4, 0]] and near == [[[3, 2], [4, 3]]]
    except Exception as error:  # no Triton, no compiler, a card too old: each says so in its own way
        told = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton does not run here, PyTorch's kernels stand in for ours: {told}", stacklevel=4)
        return False


def _farthest_in_steps(xyz: Tensor, num_samples: int, start: int) -> Tensor:
    """The same choice in torch, for any device."""
    batch, count = xyz.shape[:2]
    columns = xyz.transpose(1, 2).contiguous()
    chosen = torch.full((batch, num_samples), start, dtype=torch.long, device=xyz.device)
    nearest = torch.full((batch, count), torch.inf, dtype=xyz.dtype, device=xyz.device)
    current = chosen[:, :1]
    for i in range(1, num_samples):
        centre = columns.gather(2, current.unsqueeze(1).expand(-1, 3, -1))
        nearest = torch.minimum(nearest, (columns - centre).square_().sum(dim=1))
        nearest.scatter_(1, current, -1.0)
        current = nearest.argmax(dim=1, keepdim=True)
        chosen[:, i : i + 1] = current
    return chosen


def k_nearest_neighbors(queries: Tensor, xyz: Tensor, k: int) -> Tensor:
    """Indices of the k points nearest to each query, nearest first.

    Distances are taken by differences, not by the expanded square, so that near points are not confused by rounding. Of
    equally near points those with the lowest index are taken, in that order; on a device without Triton, and of clouds too
    large for its kernel, which of them is left open.

    Args:
        queries: (B, G, 3).
        xyz: (B, N, 3) with N >= k.
        k: number of neighbours; a query that is itself a point counts as its own neighbour.

    Returns:
        (B, G, k) int64 indices into N.

    Raises:
        DataError: when the cloud has fewer than k points, or on a CPU coordinates that are not finite.
    """
    if not 1 <= k <= xyz.shape[1]:
        raise DataError(f"cannot find {k} neighbours in a cloud of {xyz.shape[1]} points; give a larger cloud")
    queries, xyz = queries.detach().float(), xyz.detach().float()
    if xyz.device.type == "cpu":
        return torch.from_numpy(nearest_points(queries.numpy(), xyz.numpy(), k))
    if kernel_runs(xyz.device):
        from pointalign.kernels import MOST_POINTS, choose_nearest

        if xyz.shape[1] <= MOST_POINTS:
            return choose_nearest(queries, xyz, k)
    return _nearest_in_pieces(queries, xyz, k)


def _nearest_in_pieces(queries: Tensor, xyz: Tensor, k: int) -> Tensor:
    """In torch, for any device: as many clouds at a time, or queries of one, as their distances have room for."""
    clouds = max(DISTANCES_AT_ONCE // (queries.shape[1] * xyz.shape[1]), 1)
    some = max(DISTANCES_AT_ONCE // xyz.shape[1], 1)
    pieces = []
    for query, cloud in zip(queries.split(clouds), xyz.split(clouds), strict=True):
        found = [_nearest_by_matrix(part, cloud, k) for part in query.split(some, dim=1)]
        pieces.append(torch.cat(found, dim=1))
    return torch.cat(pieces)


def _nearest_by_matrix(queries: Tensor, xyz: Tensor, k: int) -> Tensor:
    distances = torch.cdist(queries, xyz, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, dim=-1, largest=False, sorted=True).indices


def chamfer_distances(first: Tensor, second: Tensor) -> Tensor:
    """Distance of each cloud of one set from each of another: mean distance of its points to the other's nearest ones.

    The mean of both ways, in the clouds' own units; computed on one thread, in pieces that stay in a core's cache.

    Args:
        first: (A, N, 3).
        second: (B, M, 3).

    Returns:
        (A, B), 0 where the clouds hold the same points.

    Source: Fan et al. 2017 (arXiv 1612.00603), section 4.2, with plain instead of squared distances.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in farthest_point_sample: steps too small for the pool
    try:
        at_once = max(PAIRS_AT_ONCE // (first.shape[1] * second.shape[1]), 1)
        rows = [torch.cat([_chamfer(cloud, part) for part in second.split(at_once)]) for cloud in first]
    finally:
        torch.set_num_threads(threads)
    return torch.stack(rows)


def _chamfer(cloud: Tensor, others: Tensor) -> Tensor:
    """(N, 3) against (B, M, 3): (B,). Distances by the expanded square, which errs by some 1e-3 where points coincide."""
    squares = others.square().sum(dim=-1).unsqueeze(1) + cloud.square().sum(dim=-1).unsqueeze(-1)
    squares = torch.baddbmm(squares, cloud.expand(len(others), -1, -1), others.transpose(1, 2), alpha=-2)
    return sum(squares.amin(dim=way).clamp_min_(0).sqrt_().mean(dim=-1) for way in (1, 2)) / 2  # pyright: ignore


def gather_points(points: Tensor, indices: Tensor) -> Tensor:
    """Pick rows of each cloud: points (B, N, C) and indices (B, ...) give (B, ..., C)."""
    flat = indices.reshape(indices.shape[0], -1, 1).expand(-1, -1, points.shape[-1])
    return points.gather(1, flat).reshape(*indices.shape, points.shape[-1])


def group_points(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Cut each cloud into overlapping local groups around farthest points.

    Args:
        points: (B, N, C) with C >= 3.
        num_groups: G, the number of centres (512 at paper scale).
        group_size: K, the neighbours of each centre (32 at paper scale).

    Returns:
        groups (B, G, K, C) with xyz relative to the centre and the other columns kept, and centers (B, G, 3).

    Raises:
        DataError: when a cloud has fewer than max(G, K) points.

    Source: Point-BERT (arXiv 2111.14819), section 3.1; constants from PointAlign (arXiv 2603.00412).
    """
    xyz = points[..., :3]
    centers = gather_points(xyz, farthest_point_sample(xyz, num_groups))
    groups = gather_points(points, k_nearest_neighbors(centers, xyz, group_size))
    relative = groups[..., :3] - centers.unsqueeze(2)
    return torch.cat([relative, groups[..., 3:]], dim=-1), centers
