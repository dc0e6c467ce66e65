"""Geometry against brute force in numpy. Coordinates lie on a grid, so that distances are exact and ties are real."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pointalign import cpu_geometry, geometry
from pointalign.errors import DataError
from pointalign.geometry import (
    chamfer_distances,
    farthest_point_sample,
    gather_points,
    group_points,
    k_nearest_neighbors,
    normalize_point_cloud,
)


@st.composite
def grid_clouds(draw, min_points=1, max_points=24):
    """(N, 3) whole numbers in a small box: duplicates, collinear points and ties come by themselves."""
    count = draw(st.integers(min_points, max_points))
    side = draw(st.sampled_from([0, 1, 2, 9]))
    kind = draw(st.sampled_from(["box", "line", "point"]))
    rows = draw(st.lists(st.tuples(*[st.integers(-side, side)] * 3), min_size=count, max_size=count))
    cloud = np.array(rows, dtype=np.float64)
    if kind == "line":
        cloud[:, 1:] = cloud[:, :1] * [2, -1]
    if kind == "point":
        cloud[:] = cloud[0]
    return cloud


def farthest_by_brute_force(cloud, count, start):
    chosen = [start]
    while len(chosen) < count:
        best, best_distance = None, -1
        for i in range(len(cloud)):
            if i in chosen:
                continue
            distance = min(((cloud[i] - cloud[j]) ** 2).sum() for j in chosen)
            if distance > best_distance:
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


@given(grid_clouds(), st.data())
def test_farthest_point_sample_is_brute_force(cloud, data):
    count = data.draw(st.integers(1, len(cloud)))
    start = data.draw(st.integers(0, len(cloud) - 1))
    got = farthest_point_sample(torch.tensor(cloud[None], dtype=torch.float32), count, start)
    assert got.dtype == torch.long
    assert got[0].tolist() == farthest_by_brute_force(cloud, count, start)


@given(grid_clouds())
def test_all_points_are_chosen_once_when_all_are_wanted(cloud):
    xyz = torch.tensor(cloud[None], dtype=torch.float32)
    everything = farthest_point_sample(xyz, len(cloud))[0].tolist()
    assert sorted(everything) == list(range(len(cloud)))
    for count in range(1, len(cloud)):
        assert farthest_point_sample(xyz, count)[0].tolist() == everything[:count]


@pytest.mark.parametrize("step_by_step", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the CPU takes another path")
@given(grid_clouds())
def test_an_accelerator_chooses_the_same_points(step_by_step, cloud):
    xyz = torch.tensor(cloud[None], dtype=torch.float32)
    choose = geometry._farthest_in_steps if step_by_step else farthest_point_sample
    assert torch.equal(choose(xyz.cuda(), len(cloud), 0).cpu(), farthest_point_sample(xyz, len(cloud)))


@given(grid_clouds(), st.data())
def test_step_by_step_in_torch_is_the_same_choice(cloud, data):
    start = data.draw(st.integers(0, len(cloud) - 1))
    xyz = torch.tensor(np.stack([cloud, cloud[::-1].copy()]), dtype=torch.float32)
    wanted = farthest_point_sample(xyz, len(cloud), start)
    assert torch.equal(geometry._farthest_in_steps(xyz, len(cloud), start), wanted)


@given(grid_clouds(), st.data())
def test_buckets_choose_the_same_points(cloud, data):
    """Also with boxes of one or two points, filled up, where most are passed over."""
    start = data.draw(st.integers(0, len(cloud) - 1))
    points = data.draw(st.sampled_from([1, 2, 5, 1000]))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_geometry, "BUCKET_POINTS", points)
        got = cpu_geometry._Buckets(cloud.astype(dtype), start).choose(len(cloud))
    assert got.tolist() == farthest_by_brute_force(cloud, len(cloud), start)


@pytest.mark.parametrize("kind", ["ball", "sphere", "far away"])
def test_buckets_of_a_large_cloud(monkeypatch, kind):
    """Coordinates with rounding, unlike the grid's: the plain way measures all points at every step."""
    xyz = torch.randn(1, 3000, 3, generator=torch.Generator().manual_seed(0))
    if kind == "sphere":
        xyz /= xyz.norm(dim=-1, keepdim=True)
    if kind == "far away":
        xyz += 1000
    wanted = farthest_point_sample(xyz, 900, 7)
    looked_into = []
    for name, value in (("DENSE_POINTS", 2999), ("DENSE_SAMPLES", 899), ("BUCKET_POINTS", 40)):
        monkeypatch.setattr(cpu_geometry, name, value)
    look = cpu_geometry._Buckets._look_into
    monkeypatch.setattr(
        cpu_geometry._Buckets, "_look_into", lambda self, b, c: looked_into.append(len(b)) or look(self, b, c)
    )
    assert torch.equal(farthest_point_sample(xyz, 900, 7), wanted)
    assert max(looked_into[-100:]) < 64, "far boxes are to be passed over, or nothing is saved"


def test_one_repeated_point_is_chosen_in_order():
    assert farthest_point_sample(torch.full((1, 6, 3), 0.3), 6)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_equally_far_points_are_taken_by_lowest_index():
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert farthest_point_sample(square[None], 5)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("values_at_once", [1, 80, 10**6])
def test_clouds_of_a_batch_do_not_mix(monkeypatch, values_at_once):
    monkeypatch.setattr(cpu_geometry, "CACHED_VALUES", values_at_once)
    clouds = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    together = farthest_point_sample(clouds, 17)
    for cloud, row in zip(clouds, together, strict=True):
        assert torch.equal(farthest_point_sample(cloud[None], 17)[0], row)
    assert not torch.equal(together[0], together[1])


@given(grid_clouds(min_points=2), st.integers(-5, 5), st.sampled_from([0.25, 0.5, 4.0]))
def test_sampling_is_unmoved_by_translation_and_scale(cloud, shift, scale):
    xyz = torch.tensor(cloud[None], dtype=torch.float32)
    assert torch.equal(farthest_point_sample(xyz, len(cloud)), farthest_point_sample((xyz + shift) * scale, len(cloud)))


@given(st.randoms(use_true_random=False))
def test_sampling_follows_a_permutation(random):
    cloud = torch.randn(1, 30, 3, generator=torch.Generator().manual_seed(random.randrange(1000)))
    order = [0, *random.sample(range(1, 30), 29)]
    original = farthest_point_sample(cloud, 12)[0].tolist()
    permuted = farthest_point_sample(cloud[:, order], 12)[0].tolist()
    assert [order[i] for i in permuted] == original


@pytest.mark.parametrize("count", [0, -1, 6])
def test_sampling_too_many_or_none_is_refused(count):
    with pytest.raises(DataError, match=rf"^cannot choose {count} farthest points from a cloud of 5; [^\n]+$"):
        farthest_point_sample(torch.zeros(1, 5, 3), count)


@given(grid_clouds(), grid_clouds(max_points=5), st.data())
def test_neighbours_are_brute_force(cloud, queries, data):
    k = data.draw(st.integers(1, len(cloud)))
    got = k_nearest_neighbors(
        torch.tensor(queries[None], dtype=torch.float32), torch.tensor(cloud[None], dtype=torch.float32), k
    )
    assert got.shape == (1, len(queries), k)
    for query, indices in zip(queries, got[0].tolist(), strict=True):
        distances = ((cloud - query) ** 2).sum(axis=1)
        assert len(set(indices)) == k
        assert distances[indices].tolist() == sorted(distances)[:k]


@given(grid_clouds(max_points=40), grid_clouds(max_points=5), st.data())
def test_of_equally_near_points_the_lowest_index_comes_first(cloud, queries, data):
    k = data.draw(st.integers(1, len(cloud)))
    got = k_nearest_neighbors(
        torch.tensor(queries[None], dtype=torch.float32), torch.tensor(cloud[None], dtype=torch.float32), k
    )
    for query, indices in zip(queries, got[0].tolist(), strict=True):
        assert indices == np.argsort(((cloud - query) ** 2).sum(axis=1), kind="stable")[:k].tolist()


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e25])
def test_neighbours_by_the_tree_are_those_of_all_distances(scale):
    """In float32 as it rounds: near the smallest numbers squares vanish, near the largest they overflow, and all tie."""
    xyz = torch.randn(1, 2000, 3, generator=torch.Generator().manual_seed(1)) * scale
    with np.errstate(over="ignore"):
        got = k_nearest_neighbors(xyz[:, :200], xyz, 9)[0]
        squares = ((xyz[0, :200, None] - xyz) ** 2).unbind(-1)
    everything = (squares[0] + squares[1] + squares[2]).numpy()
    assert got.tolist() == np.argsort(everything, axis=1, kind="stable")[:, :9].tolist()


@pytest.mark.parametrize("at_once", [1, 30, 90, 200, 10**6])
def test_neighbours_by_matrix_are_the_same_in_pieces(monkeypatch, at_once):
    """What an accelerator does, on a CPU: whole clouds or some queries of one at a time."""
    monkeypatch.setattr(geometry, "DISTANCES_AT_ONCE", at_once)
    xyz = torch.randn(3, 30, 3, generator=torch.Generator().manual_seed(2))
    sizes = []
    plain = geometry._nearest_by_matrix

    def watched(queries, cloud, k):
        sizes.append(len(queries) * queries.shape[1] * cloud.shape[1])
        return plain(queries, cloud, k)

    monkeypatch.setattr(geometry, "_nearest_by_matrix", watched)
    got = geometry._nearest_in_pieces(xyz[:, :3], xyz, 4)
    assert torch.equal(got, k_nearest_neighbors(xyz[:, :3], xyz, 4))
    assert max(sizes) <= max(at_once, 30)


def test_neighbours_of_what_is_no_number_are_refused():
    cloud = torch.zeros(1, 5, 3)
    cloud[0, 2, 1] = torch.nan
    with pytest.raises(DataError, match=r"^a cloud holds coordinates that are not finite; [^\n]+$"):
        k_nearest_neighbors(torch.zeros(1, 1, 3), cloud, 2)


def test_near_points_far_from_the_origin_are_told_apart():
    xyz = torch.tensor([[[1000.0, 0, 0], [1000.001, 0, 0], [1000.002, 0, 0], [1000.004, 0, 0]]])
    assert k_nearest_neighbors(xyz[:, 3:], xyz, 4)[0, 0].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("k", [0, 6])
def test_too_many_neighbours_are_refused(k):
    with pytest.raises(DataError, match=rf"^cannot find {k} neighbours in a cloud of 5 points; [^\n]+$"):
        k_nearest_neighbors(torch.zeros(1, 2, 3), torch.zeros(1, 5, 3), k)


def test_gather_picks_rows_of_their_own_cloud():
    points = torch.arange(2 * 4 * 5.0).view(2, 4, 5)
    indices = torch.tensor([[[3, 0], [1, 1]], [[2, 2], [0, 3]]])
    got = gather_points(points, indices)
    for cloud in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(got[cloud, i, j], points[cloud, indices[cloud, i, j]])


def test_groups_hold_neighbours_relative_to_their_centre_with_their_colours():
    generator = torch.Generator().manual_seed(3)
    points = torch.cat([torch.randn(2, 30, 3, generator=generator), torch.rand(2, 30, 3, generator=generator)], dim=-1)
    groups, centers = group_points(points, 7, 5)
    assert groups.shape == (2, 7, 5, 6)
    assert centers.shape == (2, 7, 3)
    for cloud in range(2):
        xyz = points[cloud, :, :3].double().numpy()
        for group, start in enumerate(farthest_by_brute_force(xyz, 7, 0)):
            assert torch.equal(centers[cloud, group], points[cloud, start, :3])
            nearest = np.argsort(((xyz - xyz[start]) ** 2).sum(axis=1))[:5]
            expected = points[cloud, nearest].clone()
            expected[:, :3] -= points[cloud, start, :3]
            assert torch.equal(groups[cloud, group], expected)
            assert torch.equal(groups[cloud, group, 0, :3], torch.zeros(3))


@pytest.mark.parametrize(("num_groups", "group_size"), [(9, 2), (2, 9)])
def test_grouping_needs_enough_points(num_groups, group_size):
    with pytest.raises(DataError, match="cloud of 8"):
        group_points(torch.zeros(1, 8, 6), num_groups, group_size)


def test_normalise_by_hand():
    cloud = torch.tensor(
        [[2.0, 1, 1, 0.1, 0.2, 9.0], [6, 1, 1, 0.4, 0.5, 0.6], [4, 4, 1, 0, 0, 0], [4, -2, 1, 1, 1, 1]]
    )
    expected = torch.tensor([[-2.0, 0, 0], [2, 0, 0], [0, 3, 0], [0, -3, 0]]) / 3
    got = normalize_point_cloud(cloud)
    torch.testing.assert_close(got[:, :3], expected, rtol=0, atol=1e-7)
    assert torch.equal(got[:, 3:], cloud[:, 3:])
    assert cloud[0, 0] == 2.0


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -7.7, 1e4 / 3, 1e-20])
@pytest.mark.parametrize("count", [1, 3, 7, 100, 8192])
def test_a_cloud_of_coinciding_points_becomes_zeros(value, count):
    points = torch.tensor([value, -value / 3, value * 1.7, 0.5, 0.5, 0.5]).repeat(count, 1)
    got = normalize_point_cloud(points)
    assert torch.equal(got[:, :3], torch.zeros(count, 3))
    assert torch.equal(got[:, 3:], points[:, 3:])


@given(grid_clouds(min_points=2), st.integers(-3, 3), st.sampled_from([0.125, 1.0, 8.0]))
def test_normalise_gives_a_centred_unit_ball_whatever_place_and_size(cloud, shift, scale):
    got = normalize_point_cloud(torch.tensor(cloud, dtype=torch.float32))
    moved = normalize_point_cloud(torch.tensor((cloud + shift) * scale, dtype=torch.float32))
    torch.testing.assert_close(got, moved, rtol=0, atol=2e-6)
    if np.ptp(cloud, axis=0).max() > 0:
        assert got.mean(dim=0).abs().max() < 1e-6
        assert abs(got.norm(dim=-1).max() - 1) < 1e-6


def test_normalise_treats_each_cloud_of_a_batch_alone():
    clouds = torch.randn(2, 3, 20, 6, generator=torch.Generator().manual_seed(0)) * 5
    got = normalize_point_cloud(clouds)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], normalize_point_cloud(clouds[i, j]), rtol=0, atol=1e-6)


def test_chamfer_distances_by_hand():
    first = torch.tensor([[[0.0, 0, 0], [1, 0, 0]], [[5.0, 0, 0], [5, 0, 0]]])
    second = torch.tensor([[[0.0, 0, 0], [0, 2, 0], [1, 0, 0]]])
    # (0 + 0) / 2 one way, (0 + 2 + 0) / 3 back; (4 + 4) / 2 one way, (5 + sqrt(29) + 4) / 3 back
    expected = torch.tensor([[(0 + 2 / 3) / 2], [(4 + (5 + 29**0.5 + 4) / 3) / 2]])
    torch.testing.assert_close(chamfer_distances(first, second), expected)
    torch.testing.assert_close(chamfer_distances(second, first), expected.T)


def test_chamfer_distances_in_pieces_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 7, 3, generator=generator), torch.rand(5, 9, 3, generator=generator)
    whole, threads = chamfer_distances(first, second), torch.get_num_threads()
    monkeypatch.setattr("pointalign.geometry.PAIRS_AT_ONCE", 130)
    torch.testing.assert_close(chamfer_distances(first, second), whole)
    assert torch.get_num_threads() == threads
