"""Baselines that learn no shape: what a model has to beat before its numbers say that it understands a cloud.

Each is a function from labelled training objects to predictions about others: a score per class and a caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pointalign.data.household import HouseholdObject
from pointalign.data.household_text import reference_caption
from pointalign.geometry import chamfer_distances

CHAMFER_POINTS = 512
TREES = 500
# Columns that each split of a tree looks at; chosen over the usual root of their number by folds of the training objects.
SHARE_OF_COLUMNS = 0.3
D2_SHIFTS = (1, 7, 61, 311)
# Of a class that no tree votes for: its logarithm is finite and below that of one vote.
NO_VOTE = 1e-6

Objects = Sequence[HouseholdObject]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Prediction:
    """What a baseline says about one object.

    Args:
        scores: one number per class; the highest wins.
        caption: a training object's caption.
    """

    scores: tuple[float, ...]
    caption: str


Baseline = Callable[[Objects, Objects, Sequence[str], Advance], list[Prediction]]


def most_frequent(train: Objects, objects: Objects, classes: Sequence[str], advance: Advance) -> list[Prediction]:
    """The largest class of the training objects and their most frequent caption (of equally frequent ones the first in
    alphabetical order), whatever the cloud.

    Args:
        train: objects whose class and caption are known.
        objects: those to predict.
        classes: the closed set.
        advance: called with the number of objects done.
    """
    counts = Counter(thing.label for thing in train)
    captions = Counter(reference_caption(thing) for thing in train)
    caption = min(captions, key=lambda text: (-captions[text], text))
    scores = tuple(float(np.log(max(counts[name] / len(train), NO_VOTE))) for name in classes)
    advance(len(objects))
    return [Prediction(scores, caption) for _ in objects]


def chamfer(train: Objects, objects: Objects, classes: Sequence[str], advance: Advance) -> list[Prediction]:
    """Class and caption of the training object whose points are nearest; colour, size and pose play no part.

    A class's score is minus the distance to its nearest object. Arguments as `most_frequent`.
    """
    known = torch.from_numpy(np.stack([thing.points[:CHAMFER_POINTS, :3] for thing in train]))
    members = {name: np.array([thing.label == name for thing in train]) for name in classes}
    found = []
    for thing in objects:
        cloud = torch.from_numpy(thing.points[None, :CHAMFER_POINTS, :3])
        distances = chamfer_distances(cloud, known)[0].numpy()
        # No two points of the unit ball are farther apart than 2: a class without training objects comes last.
        scores = tuple(-float(distances[members[name]].min(initial=2.0)) for name in classes)
        found.append(Prediction(scores, reference_caption(train[int(distances.argmin())])))
        advance(1)
    return found


def forest(train: Objects, objects: Objects, classes: Sequence[str], advance: Advance) -> list[Prediction]:
    """A random forest on histograms of shape and colour and on the metric size; arguments as `most_frequent`.

    A class's score is the logarithm of its probability. The caption is that of the training object that shares most leaves.

    Source: Breiman 2001, "Random forests" (proximity: section on proximities of its manual), by scikit-learn.
    """
    return _grow(train, objects, classes, advance, with_size=True)


def forest_without_size(train: Objects, objects: Objects, classes: Sequence[str], advance: Advance) -> list[Prediction]:
    """As `forest`, without the metric size, which a normalised cloud does not show."""
    return _grow(train, objects, classes, advance, with_size=False)


BASELINES: dict[str, Baseline] = {
    "most-frequent": most_frequent,
    "chamfer": chamfer,
    "forest": forest,
    "forest-without-size": forest_without_size,
}


def _grow(
    train: Objects, objects: Objects, classes: Sequence[str], advance: Advance, with_size: bool
) -> list[Prediction]:
    from sklearn.ensemble import RandomForestClassifier

    known, asked = (np.stack([histograms(thing, with_size) for thing in part]) for part in (train, objects))
    trees = RandomForestClassifier(TREES, max_features=SHARE_OF_COLUMNS, random_state=0)  # pyright: ignore[reportArgumentType]
    trees.fit(known, [thing.label for thing in train])
    shares = np.zeros((len(objects), len(classes)))
    shares[:, [classes.index(name) for name in trees.classes_]] = trees.predict_proba(asked)
    leaves, own_leaves = trees.apply(known), trees.apply(asked)
    nearest = [int((leaves == row).mean(axis=1).argmax()) for row in own_leaves]
    advance(len(objects))
    return [
        Prediction(tuple(row), reference_caption(train[index]))
        for row, index in zip(np.log(np.maximum(shares, NO_VOTE)).tolist(), nearest, strict=True)
    ]


def histograms(thing: HouseholdObject, with_size: bool) -> np.ndarray:
    """What a forest sees of an object: shares and ratios, nothing learnt.

    Returns:
        Box proportions (3); histograms of distances between pairs of points (32 bins up to 2), of the points' distances
        from the centre (16), heights in the box (16) and distances from the vertical axis (16); colours in 4 x 4 x 4 cells
        of sRGB; with size also the logarithms of width, height and depth in centimetres.

    Source: distances between pairs are the D2 distribution of Osada et al. 2002, "Shape distributions".
    """
    xyz, rgb = thing.points[:, :3], thing.points[:, 3:]
    extents = np.ptp(xyz, axis=0)
    pairs = np.concatenate([np.linalg.norm(xyz - np.roll(xyz, shift, axis=0), axis=1) for shift in D2_SHIFTS])
    heights = (xyz[:, 1] - xyz[:, 1].min()) / max(float(extents[1]), 1e-9)
    cells = (np.minimum((rgb * 4).astype(int), 3) @ np.array([16, 4, 1])).astype(int)
    parts = [
        extents / extents.max(),
        _shares(pairs, 32, 2.0),
        _shares(np.linalg.norm(xyz, axis=1), 16, 1.0),
        _shares(heights, 16, 1.0),
        _shares(np.linalg.norm(xyz[:, [0, 2]], axis=1), 16, 1.0),
        np.bincount(cells, minlength=64) / len(cells),
    ]
    if with_size:
        parts.append(np.log(np.maximum(thing.size_cm, 1e-3)))
    return np.concatenate(parts)


def _shares(values: np.ndarray, bins: int, most: float) -> np.ndarray:
    return np.histogram(np.clip(values, 0, most), bins, (0, most))[0] / len(values)
