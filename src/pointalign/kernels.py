"""Triton kernels, each one launch for a whole batch: farthest points, nearest neighbours, and the heads of the Phi variant.

`geometry` and `models.phi_heads` import this on a GPU alone. With TRITON_INTERPRET=1 set before the import the same kernels
run on tensors of a CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

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
# Heads of tokens that a program works on at a time, and how many programs share those of the way back, each of which adds up
# the norms' gradients of its own. Among the fastest of 45 choices on an H100 (docs/LOG.md, 2026-11-26).
HEADS_AT_ONCE = 8
HEADS_WARPS = 1
MOST_PROGRAMS = 1024


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


@triton.jit
def _partners(lane, half: tl.constexpr):
    """Which lane each one is rotated with; itself behind the rotated ones."""
    return tl.where(lane < half, lane + half, tl.where(lane < 2 * half, lane - half, lane))


@triton.jit
def _moments(x, inside, eps, WIDTH: tl.constexpr):
    """Mean of each row of x (ROWS, LANES), what differs from it, and what makes that of variance 1."""
    mean = (tl.sum(x, axis=1) / WIDTH)[:, None]
    centered = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=1) / WIDTH + eps)[:, None]
    return mean, centered, scale


@triton.jit
def _split_heads(
    fused, query_weight, query_bias, key_weight, key_bias, cos, sin, query, key, value,
    rows, heads, places, eps, WIDTH: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """fused (rows, 3, WIDTH), cos and sin (places, ROTARY); query, key and value (rows, WIDTH)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    there, known = row[:, None] < rows, lane[None, :] < WIDTH
    inside, turned = there & known, there & (lane[None, :] < ROTARY)
    half: tl.constexpr = ROTARY // 2
    partner = _partners(lane, half)
    angle = ((row // heads) % places)[:, None] * ROTARY + lane[None, :]
    cosine = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    sine = tl.where(lane[None, :] < half, -sine, sine)
    base = row.to(tl.int64)[:, None] * (3 * WIDTH)
    into = row.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    for part in tl.static_range(2):
        x = tl.load(fused + base + part * WIDTH + lane[None, :], mask=inside, other=0.0).to(tl.float32)
        mean, centered, scale = _moments(x, inside, eps, WIDTH)
        weights = query_weight if part == 0 else key_weight
        biases = query_bias if part == 0 else key_bias
        weight = tl.load(weights + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        bias = tl.load(biases + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        normal = centered * scale * weight[None, :] + bias[None, :]
        x = tl.load(fused + base + part * WIDTH + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        weight = tl.load(weights + partner, mask=lane < WIDTH, other=0.0).to(tl.float32)
        bias = tl.load(biases + partner, mask=lane < WIDTH, other=0.0).to(tl.float32)
        other = (x - mean) * scale * weight[None, :] + bias[None, :]
        turning = normal * cosine + other * sine
        if part == 0:
            tl.store(query + into, turning.to(query.dtype.element_ty), mask=inside)
        else:
            tl.store(key + into, turning.to(key.dtype.element_ty), mask=inside)
    tl.store(value + into, tl.load(fused + base + 2 * WIDTH + lane[None, :], mask=inside), mask=inside)


@triton.jit
def _join_heads(
    query, key, value, fused, query_weight, key_weight, cos, sin, gradient, norms,
    rows, heads, places, eps, WIDTH: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients query, key and value (rows, WIDTH); gradient as fused; norms (4, WIDTH, programs) float32."""
    lane = tl.arange(0, LANES)
    half: tl.constexpr = ROTARY // 2
    partner = _partners(lane, half)
    for part in tl.static_range(2):
        weights = query_weight if part == 0 else key_weight
        weight = tl.load(weights + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        # Rows are added up once, at the end: that is among threads, and they would wait for each other in every round.
        of_weight = tl.zeros((ROWS, LANES), tl.float32)
        of_bias = tl.zeros((ROWS, LANES), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            row = block * ROWS + tl.arange(0, ROWS)
            there = row[:, None] < rows
            inside, turned = there & (lane[None, :] < WIDTH), there & (lane[None, :] < ROTARY)
            place = ((row // heads) % places)[:, None] * ROTARY
            cosine = tl.load(cos + place + lane[None, :], mask=turned, other=1.0).to(tl.float32)
            sine = tl.load(sin + place + partner[None, :], mask=turned, other=0.0).to(tl.float32)
            sine = tl.where(lane[None, :] < half, sine, -sine)
            start = row.to(tl.int64)[:, None] * WIDTH
            base = row.to(tl.int64)[:, None] * (3 * WIDTH) + lane[None, :]
            given = query if part == 0 else key
            own = tl.load(given + start + lane[None, :], mask=inside, other=0.0).to(tl.float32)
            other = tl.load(given + start + partner[None, :], mask=turned, other=0.0).to(tl.float32)
            plain = own * cosine + other * sine
            x = tl.load(fused + base + part * WIDTH, mask=inside, other=0.0).to(tl.float32)
            _, centered, scale = _moments(x, inside, eps, WIDTH)
            normal = centered * scale
            of_weight += plain * normal
            of_bias += plain
            inner = plain * weight[None, :]
            level = (tl.sum(inner, axis=1) / WIDTH)[:, None]
            along = (tl.sum(inner * normal, axis=1) / WIDTH)[:, None]
            back = (inner - level - normal * along) * scale
            tl.store(gradient + base + part * WIDTH, back.to(gradient.dtype.element_ty), mask=inside)
            if part == 0:
                passed = tl.load(value + start + lane[None, :], mask=inside, other=0.0)
                tl.store(gradient + base + 2 * WIDTH, passed.to(gradient.dtype.element_ty), mask=inside)
        sums = norms + (2 * part * WIDTH + lane) * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums, tl.sum(of_weight, axis=0), mask=lane < WIDTH)
        tl.store(sums + WIDTH * tl.num_programs(0), tl.sum(of_bias, axis=0), mask=lane < WIDTH)


def launch_split_heads(
    fused: Tensor, norms: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`models.phi_heads.split_heads` on a GPU; `norms` are weight and bias of queries, weight and bias of keys."""
    fused, sizes = fused.contiguous(), _sizes_of_heads(fused, cos)
    query, key, value = (fused.new_empty(*fused.shape[:3], fused.shape[4]) for _ in range(3))
    with torch.cuda.device_of(fused):
        launch = _split_heads[(triton.cdiv(sizes["rows"], HEADS_AT_ONCE),)]  # pyright: ignore[reportIndexIssue]
        tables = (table.contiguous() for table in (*norms, cos, sin))
        launch(fused, *tables, query, key, value, eps=eps, **sizes, num_warps=HEADS_WARPS)
    return query, key, value


def launch_join_heads(
    gradients: Sequence[Tensor], fused: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`models.phi_heads.join_heads` on a GPU; `gradients` are those of queries, keys and values, `weights` the norms'."""
    fused, sizes = fused.contiguous(), _sizes_of_heads(fused, cos)
    programs = min(triton.cdiv(sizes["rows"], HEADS_AT_ONCE), MOST_PROGRAMS)
    gradient = torch.empty_like(fused)
    norms = torch.empty(4, fused.shape[4], programs, dtype=torch.float32, device=fused.device)
    with torch.cuda.device_of(fused):
        launch = _join_heads[(programs,)]  # pyright: ignore[reportIndexIssue]
        given = (tensor.contiguous() for tensor in gradients)
        tables = (table.contiguous() for table in (*weights, cos, sin))
        launch(*given, fused, *tables, gradient, norms, eps=eps, **sizes, num_warps=HEADS_WARPS)
    return gradient, norms.sum(dim=2)


def _sizes_of_heads(fused: Tensor, cos: Tensor) -> dict[str, int]:
    batch, length, heads, _, width = fused.shape
    return {
        "rows": batch * length * heads,
        "heads": heads,
        "places": len(cos) * length,
        "WIDTH": width,
        "ROTARY": cos.shape[-1],
        "ROWS": HEADS_AT_ONCE,
        "LANES": triton.next_power_of_2(width),
    }
