"""Extra training objects: models of free games as coloured clouds, each with a noun, a licence and a creator.

Their file is not bundled; `pointalign data extra` builds it from Debian packages: docs/extra_data.md tells how. None of
them is near a held-out object of household, so that they can join its training side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.data.household import read_clouds, read_columns, with_unit
from pointalign.data.household_text import build_instructions


@dataclass(frozen=True)
class ExtraObject:
    """One object.

    Attributes:
        id: package and path in lower case, for instance "0ad-fauna-wolf".
        name, category, tags: the model's file and its folders, as the package has them.
        creator: whom the package names.
        licence: SPDX identifier.
        source: the Debian package.
        size: extents along x, y (height) and z in metres; None where the model's unit is not certain.
        label: one of `household_classes()` where it is certainly that, else None.
        noun: what it is in plain English with its article, for instance "a palm tree".
        family: what it shares with the models that are nearly the same.
        points: (2048, 6) float32 in farthest-point order, y up: xyz in the unit ball, rgb (sRGB) in [0, 1].
    """

    id: str
    name: str
    category: str
    tags: tuple[str, ...]
    creator: str
    licence: str
    source: str
    size: tuple[float, float, float] | None
    label: str | None
    noun: str
    family: str
    points: np.ndarray = field(repr=False, compare=False)

    @property
    def sized_points(self) -> np.ndarray:
        """(2048, 7): the points, and in every row the unit of xyz in metres, 0 where the size is not known."""
        return with_unit(self.points, self.size)


def load_extra(path: str | Path) -> list[ExtraObject]:
    """Load the objects of a file that `build_extra` wrote, ordered by id.

    Raises:
        DataError: when the file is missing, broken or of another layout.
    """
    columns = [name for name in ExtraObject.__dataclass_fields__ if name != "points"]
    table = read_columns(Path(path), columns, "extra")
    clouds = read_clouds(table)
    rows = table.drop_columns(["xyz", "rgb"]).to_pylist()
    for row, cloud in zip(rows, clouds, strict=True):
        size = row["size"] and tuple(row["size"])
        row.update(tags=tuple(row["tags"]), size=size, points=cloud)
    return [ExtraObject(**row) for row in rows]


def build_descriptions(objects: Iterable[ExtraObject]) -> list[dict[str, Any]]:
    """Brief descriptions of each object in PointLLM's format: what it is, and its main colours.

    `household_text.build_instructions` gives all four types of conversation, also for these objects.

    Returns:
        For each object, in order, its three simple_description conversations.
    """
    return [item for item in build_instructions(objects) if item["conversation_type"] == "simple_description"]
