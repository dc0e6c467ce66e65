"""What is asked of the features: class, dominant colour, and geometry that is computed from the cloud itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pointalign.data.colors import dominant_colors
from pointalign.data.household import HouseholdObject
from pointalign.data.household_split import family_folds
from pointalign.errors import ConfigError
from pointalign.probing.probes import Folds

# Sides of a box shorter than this share of the unit ball's radius count as this long.
SHORTEST_SIDE = 0.02
QUARTERS = 4


@dataclass(frozen=True)
class Targets:
    """What is known of n objects.

    Args:
        classes: (n,) names.
        colors: (n,) the basic colour that most points have.
        box: (n, 3) logarithms of the box's sides over their geometric mean.
        heights: (n, 4) shares of the points in the four quarters of the object's height.
        folds: which objects the probes are fitted on, and which they are scored on.
    """

    classes: np.ndarray
    colors: np.ndarray
    box: np.ndarray
    heights: np.ndarray
    folds: Folds

    @property
    def scored(self) -> np.ndarray:
        """Indices of the objects that count, in the order of the probes' outcomes."""
        return np.concatenate([scored for _, scored in self.folds])


def make_targets(objects: Sequence[HouseholdObject], folds: int | None = None) -> Targets:
    """The targets of household objects.

    Args:
        objects: which ones.
        folds: parts of a cross-validation over all of them, families kept together; None fits on the training split and
            scores on the held-out one.

    Raises:
        ConfigError: when there are too few objects for that.
    """
    clouds = np.stack([thing.points for thing in objects]).astype(float)
    sides = np.log(np.maximum(np.ptp(clouds[..., :3], axis=1), SHORTEST_SIDE))
    bottom, top = (end[:, None] for end in (clouds[..., 1].min(axis=1), clouds[..., 1].max(axis=1)))
    quarter = np.minimum((clouds[..., 1] - bottom) / np.maximum(top - bottom, SHORTEST_SIDE) * QUARTERS, QUARTERS - 1)
    return Targets(
        classes=np.array([thing.label for thing in objects]),
        colors=np.array([dominant_colors(cloud[:, 3:])[0].base for cloud in clouds]),
        box=sides - sides.mean(axis=1, keepdims=True),
        heights=np.stack([(quarter.astype(int) == number).mean(axis=1) for number in range(QUARTERS)], axis=1),
        folds=_folds(objects, folds),
    )


def _folds(objects: Sequence[HouseholdObject], folds: int | None) -> Folds:
    if folds is None:
        held_out = np.array([thing.split == "test" for thing in objects])
        parts = [(np.flatnonzero(~held_out), np.flatnonzero(held_out))]
    else:
        number = family_folds(objects, folds)
        part = np.array([number[thing.id] for thing in objects])
        parts = [(np.flatnonzero(part != fold), np.flatnonzero(part == fold)) for fold in range(folds)]
    if any(len(fitted) < 2 or not len(scored) for fitted, scored in parts):
        raise ConfigError(f"{len(objects)} objects are too few to fit and score probes; raise --limit")
    return parts
