"""Which household models are nearly the same, and the split that never parts them.

A family is what the reviewed table says (same creator and name, colour variants, and every pair that
`near_duplicates` finds); the split holds out whole families only, and so does every fold of a cross-validation.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.spatial import KDTree

from pointalign.data.household import HouseholdObject, LabelRow, load_household
from pointalign.errors import ConfigError, DataError

HELD_OUT_SHARE = 100 / 820
# Two models nearer than this are one family. Chosen by looking at the pairs: see docs/household.md.
NEAR_DUPLICATE_DISTANCE = 0.035
NUM_PROBES = 512
SIGNATURE_TOLERANCE = 0.1
TEST, FOLD, VALIDATION, FOLDS = "test", "fold", "validation", 5


def near_duplicates(clouds: np.ndarray, threshold: float = NEAR_DUPLICATE_DISTANCE) -> Iterator[tuple[int, int, float]]:
    """Pairs of clouds of nearly the same shape, whatever their colour.

    Each cloud is compared with the other in 8 poses: four quarter turns about the vertical, each also mirrored. Pairs
    whose boxes or radii already differ by more than SIGNATURE_TOLERANCE are not compared: their distance is larger.

    Args:
        clouds: (B, N, C) normalised clouds in farthest-point order, y up, N >= NUM_PROBES.
        threshold: largest chamfer distance of a pair.

    Yields:
        Indices i < j and the chamfer distance of their best pose, in radii of the unit ball.
    """
    xyz = clouds[..., :3].astype(np.float64)
    xyz = xyz - (xyz.max(axis=1, keepdims=True) + xyz.min(axis=1, keepdims=True)) / 2
    signatures = np.stack([shape_signature(cloud) for cloud in xyz])
    trees = [KDTree(cloud) for cloud in xyz]
    for i in range(len(xyz)):
        gaps = np.abs(signatures[i + 1 :] - signatures[i]).max(axis=1)
        for j in i + 1 + np.flatnonzero(gaps <= SIGNATURE_TOLERANCE):
            distance = min(chamfer_distance(xyz[i], xyz[j], trees[i], trees[j], pose) for pose in POSES)
            if distance <= threshold:
                yield i, int(j), distance


def _quarter_turns() -> list[np.ndarray]:
    """The 8 poses as matrices: quarter turns about y, and their mirror images."""
    turn = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    turns = [np.linalg.matrix_power(turn, k) for k in range(4)]
    return turns + [t @ np.diag([-1.0, 1, 1]) for t in turns]


POSES = _quarter_turns()


def shape_signature(xyz: np.ndarray) -> np.ndarray:
    """What no pose changes: the box (height, longer side, shorter side) and quantiles of distance from its centre."""
    width, height, depth = np.ptp(xyz, axis=0)
    radii = np.quantile(np.linalg.norm(xyz, axis=1), np.linspace(0.1, 0.9, 9))
    return np.concatenate([[height, max(width, depth), min(width, depth)], radii])


def chamfer_distance(a: np.ndarray, b: np.ndarray, tree_a: KDTree, tree_b: KDTree, pose: np.ndarray) -> float:
    """Mean distance from the first points of each cloud to the other, the larger of both ways, with `a` in a pose."""
    forth = tree_b.query(a[:NUM_PROBES] @ pose.T)[0].mean()
    back = tree_a.query(b[:NUM_PROBES] @ pose)[0].mean()
    return float(max(forth, back))


def assign_splits(rows: Iterable[LabelRow], share: float = HELD_OUT_SHARE) -> dict[str, str]:
    """Hold out a share of the objects, stratified by label and never part of a family.

    Each label's quota is its share of the held-out places, rounded by largest remainder. Families are tried in the
    order of a hash of their name and taken while they fit the quota. Places that no family of a label fits go, one by
    one, to the label with the smallest held-out share so far.

    Returns:
        "train" or "test" for each object id.
    """
    families: defaultdict[str, list[LabelRow]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    sizes = Counter(row.label for members in families.values() for row in members)
    total = sum(sizes.values())
    left = _largest_remainder(sizes, round(total * share))
    order = sorted(families, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held: set[str] = set()
    for name in order:
        need = Counter(row.label for row in families[name])
        if all(left[label] >= count for label, count in need.items()):
            held.add(name)
            left.subtract(need)
    held_labels = Counter(row.label for name in held for row in families[name])
    for _ in range(sum(left.values())):
        single = [name for name in order if name not in held and len(families[name]) == 1]
        if not single:
            break
        name = min(single, key=lambda name: held_labels[families[name][0].label] / sizes[families[name][0].label])
        held.add(name)
        held_labels[families[name][0].label] += 1
    return {row.id: "test" if name in held else "train" for name, members in families.items() for row in members}


def _largest_remainder(sizes: Counter[str], seats: int) -> Counter[str]:
    """Share out seats in proportion to sizes. Source: Hamilton's method of apportionment."""
    total = sum(sizes.values())
    exact = {label: size * seats / total for label, size in sizes.items()}
    quota = Counter({label: int(value) for label, value in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], label))
    for label in by_remainder[: seats - sum(quota.values())]:
        quota[label] += 1
    return quota


def family_folds(things: Sequence[LabelRow | HouseholdObject], folds: int = 5, seed: int = 0) -> dict[str, int]:
    """Parts of about equal size for cross-validation: stratified by label, and never part of a family.

    The held-out split plays no part: all objects given are folded. A model that is reported on the held-out 100 is not
    chosen by these folds, unless only training objects are given.

    Args:
        things: the objects, in any order.
        folds: how many parts.
        seed: of the shuffling.

    Returns:
        The number of its part, from 0, for each object id.

    Raises:
        DataError: when there are fewer families than folds.

    Source: scikit-learn's StratifiedGroupKFold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    things = sorted(things, key=lambda thing: thing.id)
    families = [thing.family for thing in things]
    if not 2 <= folds <= len(set(families)):
        raise DataError(
            f"cannot part {len(set(families))} families into {folds} folds; give 2 or more, and fewer folds"
        )
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer objects than folds
        for number, (_, held) in enumerate(parts.split(families, [thing.label for thing in things], families)):
            found.update({things[index].id: number for index in held})
    return found


def check_part(held_out: str) -> None:
    """See that a name is one of a part that can be held out, see `household_sides`.

    Raises:
        ConfigError: when it is not.
    """
    kind, _, number = held_out.partition("-")
    if held_out != TEST and (kind not in (FOLD, VALIDATION) or number not in map(str, range(FOLDS))):
        raise ConfigError(
            f"there is no part {held_out!r} of household to hold out; known are {TEST}, {FOLD}-0 to {FOLD}-{FOLDS - 1} and "
            f"{VALIDATION}-0 to {VALIDATION}-{FOLDS - 1}"
        )


def household_sides(held_out: str = TEST) -> tuple[list[HouseholdObject], list[HouseholdObject]]:
    """The objects to train on and the objects to measure on.

    Args:
        held_out: "test", the 100 objects that results are reported on; "fold-0" to "fold-4", a fold of all 820, for
            cross-validating a recipe; "validation-0" to "validation-4", a fold of the 720 training objects, for choosing a
            recipe's settings: the 100 are on neither side.

    Returns:
        Two lists, each ordered by id, that share no family.

    Raises:
        ConfigError: when held_out is none of these.
    """
    check_part(held_out)
    kind, _, number = held_out.partition("-")
    objects = load_household("train" if kind == VALIDATION else None)
    if held_out == TEST:
        asked = {thing.id for thing in objects if thing.split == TEST}
    else:
        asked = {name for name, fold in family_folds(objects, FOLDS).items() if fold == int(number)}
    sides: tuple[list[HouseholdObject], list[HouseholdObject]] = ([], [])
    for thing in objects:
        sides[thing.id in asked].append(thing)
    return sides
