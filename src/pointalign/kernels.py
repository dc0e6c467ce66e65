"""Farthest points and nearest neighbours as Triton kernels, each one launch for a whole batch.

`geometry` imports this on a GPU alone. With TRITON_INTERPRET=1 set before the import the same kernels run on tensors of a
CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Points that a program works on at a time, and its warps: 8 points for each of 512 threads.
TILE = 4096
WARPS = 16
# Points of a cloud whose distances a program keeps in registers while it chooses neighbours, and its warps.
MOST_POINTS = 16_384
NEIGHBOR_WARPS = 8


@triton.jit(do_not_specialize=["start"])  # 1 would become a constant, which a loop cannot carry
def _choose(xyz, nearest, chosen, count, num_samples, start, TILE: tl.constexpr):
    """xyz (B, 3, N), nearest (B, N) filled with infinity, chosen (B, num_samples)."""
    cloud = tl.program_id(0).to(tl.int64)
    xyz += cloud * 3 * count
    nearest += cloud * count
    chosen += cloud * num_samples
    lanes = tl.arange(0, TILE)
    current = start
    tl.store(chosen, current.to(tl.int64))
    for step in range(1, num_samples):
        x = tl.load(xyz + current)
        y = tl.load(xyz + count + current)
        z = tl.load(xyz + 2 * count + current)
        # Each lane keeps its own farthest point, of equals the first; the lanes are compared once a step.
        farthest = tl.full((TILE,), -2.0, tl.float32)
        index = tl.full((TILE,), 0, tl.int32)
        for first in range(0, count, TILE):
            points = first + lanes
            inside = points < count
            dx = tl.load(xyz + points, mask=inside, other=0.0) - x
            dy = tl.load(xyz + count + points, mask=inside, other=0.0) - y
            dz = tl.load(xyz + 2 * count + points, mask=inside, other=0.0) - z
            near = tl.load(nearest + points, mask=inside, other=-2.0)
            near = tl.minimum(near, dx * dx + dy * dy + dz * dz)
            near = tl.where(points == current, -1.0, near)
            tl.store(nearest + points, near, mask=inside)
            better = near > farthest
            farthest = tl.where(better, near, farthest)
            index = tl.where(better, points, index)
        tl.debug_barrier()  # the distances stored above are read in the next step, maybe by other threads
        best = tl.max(farthest, axis=0)
        current = tl.min(tl.where(farthest == best, index, count), axis=0)
        tl.store(chosen + step, current.to(tl.int64))


def choose_farthest(xyz: Tensor, num_samples: int, start: int = 0) -> Tensor:
    """`geometry.farthest_point_sample` on a GPU, with the same choice as on a CPU, bit for bit.

    Args:
        xyz: (B, N, 3) float32 coordinates, finite, N below 2**29.
        num_samples: how many to choose, 1 <= num_samples <= N.
        start: index of the first chosen point.

    Returns:
        (B, num_samples) int64 indices into N, in the order of choice.
    """
    batch, count = xyz.shape[:2]
    columns = xyz.detach().transpose(1, 2).contiguous()
    nearest = torch.full((batch, count), torch.inf, dtype=torch.float32, device=xyz.device)
    chosen = torch.empty((batch, num_samples), dtype=torch.long, device=xyz.device)
    tile = min(TILE, triton.next_power_of_2(count))
    with torch.cuda.device_of(xyz):
        # Fused multiply-adds round once where a CPU rounds twice, and would choose other points.
        launch = _choose[(batch,)]  # pyright: ignore[reportIndexIssue]
        launch(columns, nearest, chosen, count, num_samples, start, TILE=tile, num_warps=WARPS, enable_fp_fusion=False)
    return chosen


@triton.jit
def _choose_near(queries, xyz, found, num_queries, count, k, TILE: tl.constexpr):
    """queries (B, 3, G), xyz (B, 3, N), found (B, G, k)."""
    query = tl.program_id(0)
    cloud = tl.program_id(1).to(tl.int64)
    queries += cloud * 3 * num_queries + query
    xyz += cloud * 3 * count
    found += (cloud * num_queries + query) * k
    lanes = tl.arange(0, TILE)
    inside = lanes < count
    dx = tl.load(xyz + lanes, mask=inside, other=0.0) - tl.load(queries)
    dy = tl.load(xyz + count + lanes, mask=inside, other=0.0) - tl.load(queries + num_queries)
    dz = tl.load(xyz + 2 * count + lanes, mask=inside, other=0.0) - tl.load(queries + 2 * num_queries)
    # Infinity is for points that are chosen already.
    distance = tl.minimum(dx * dx + dy * dy + dz * dz, 3.0e38)
    distance = tl.where(inside, distance, float("inf"))
    for step in range(k):
        best = tl.min(distance, axis=0)
        index = tl.min(tl.where(distance == best, lanes, TILE), axis=0)
        tl.store(found + step, index.to(tl.int64))
        distance = tl.where(lanes == index, float("inf"), distance)


def choose_nearest(queries: Tensor, xyz: Tensor, k: int) -> Tensor:
    """`geometry.k_nearest_neighbors` on a GPU, with the same choice in the same order as on a CPU, bit for bit.

    Args:
        queries: (B, G, 3) float32 coordinates, finite.
        xyz: (B, N, 3) float32 coordinates, finite, N at most `MOST_POINTS`.
        k: number of neighbours, 1 <= k <= N.

    Returns:
        (B, G, k) int64 indices into N, the nearest first and of equally near ones the lowest.
    """
    batch, count = xyz.shape[:2]
    columns, centers = (tensor.detach().transpose(1, 2).contiguous() for tensor in (xyz, queries))
    num_queries = queries.shape[1]
    found = torch.empty((batch, num_queries, k), dtype=torch.long, device=xyz.device)
    tile = max(triton.next_power_of_2(count), 16)
    with torch.cuda.device_of(xyz):
        launch = _choose_near[(num_queries, batch)]  # pyright: ignore[reportIndexIssue]
        launch(
            centers, columns, found, num_queries, count, k, TILE=tile, num_warps=NEIGHBOR_WARPS, enable_fp_fusion=False
        )
    return found
