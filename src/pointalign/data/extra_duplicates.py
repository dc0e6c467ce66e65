"""Which extra models are nearly the same as one another, and which are near a held-out object of household."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.spatial import KDTree

from pointalign.data.household_split import (
    NEAR_DUPLICATE_DISTANCE,
    POSES,
    SIGNATURE_TOLERANCE,
    chamfer_distance,
    shape_signature,
)

# Models of one game face the same way; a pair of greaves is one mirrored.
UPRIGHT = (np.eye(3), np.diag([-1.0, 1.0, 1.0]))


def shape_families(ids: Sequence[str], meshes: Sequence[str], nouns: Sequence[str], clouds: np.ndarray) -> list[str]:
    """The family of each model: those with the same mesh are one, and those of one noun and nearly one shape.

    Args:
        ids: of the models, in order.
        meshes: what mesh each shows first.
        nouns: what each is.
        clouds: (B, N, 3) normalised clouds in farthest-point order, y up.

    Returns:
        For each model the id of its family's first member.
    """
    leader = list(range(len(ids)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    def join(i: int, j: int) -> None:
        first, second = sorted((find(i), find(j)))
        leader[second] = first

    same_mesh: dict[str, int] = {}
    same_noun: defaultdict[str, list[int]] = defaultdict(list)
    for i, (mesh, noun) in enumerate(zip(meshes, nouns, strict=True)):
        join(i, same_mesh.setdefault(mesh, i))
        same_noun[noun].append(i)
    centred = _centred(clouds)
    signatures, trees = [shape_signature(cloud) for cloud in centred], [KDTree(cloud) for cloud in centred]
    for members in same_noun.values():
        for i, j in combinations(members, 2):
            if find(i) != find(j) and np.abs(signatures[i] - signatures[j]).max() <= SIGNATURE_TOLERANCE:
                distances = (chamfer_distance(centred[i], centred[j], trees[i], trees[j], pose) for pose in UPRIGHT)
                if min(distances) <= NEAR_DUPLICATE_DISTANCE:
                    join(i, j)
    return [ids[find(i)] for i in range(len(ids))]


def nearest_held_out(clouds: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The held-out object that each cloud is nearest to, in the best of the poses of `near_duplicates`.

    Objects whose boxes or radii differ by more than SIGNATURE_TOLERANCE are not compared: their distance is larger than
    that of any near-duplicate.

    Args:
        clouds: (B, N, 3) normalised clouds in farthest-point order, y up.
        held_out: (H, N, 3), the same of the held-out objects.

    Returns:
        Chamfer distances (B,) in radii of the unit ball, infinite where nothing was compared, and indices (B,).
    """
    centred, held = _centred(clouds), _centred(held_out)
    signatures = np.stack([shape_signature(cloud) for cloud in held])
    held_trees = [KDTree(cloud) for cloud in held]
    distances, nearest = np.full(len(centred), np.inf), np.zeros(len(centred), dtype=np.int64)
    for i, cloud in enumerate(centred):
        alike = np.flatnonzero(np.abs(signatures - shape_signature(cloud)).max(axis=1) <= SIGNATURE_TOLERANCE)
        tree = KDTree(cloud) if len(alike) else None
        for j in alike:
            distance = min(chamfer_distance(cloud, held[j], tree, held_trees[j], pose) for pose in POSES)
            if distance < distances[i]:
                distances[i], nearest[i] = distance, j
    return distances, nearest


def _centred(clouds: np.ndarray) -> np.ndarray:
    xyz = clouds[..., :3].astype(np.float64)
    return xyz - (xyz.max(axis=1, keepdims=True) + xyz.min(axis=1, keepdims=True)) / 2
