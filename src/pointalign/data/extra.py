"""Extra training objects: models of free games as coloured clouds, each with a noun, a licence and a creator.

Their file is not bundled; `pointalign data extra` builds it from Debian packages: docs/extra_data.md tells how. None of
them is near a held-out object of household, so that they can join its training side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointalign.data.household import CatalogObject, read_clouds, read_columns
from pointalign.data.household_text import build_instructions


@dataclass(frozen=True)
class ExtraObject(CatalogObject):
    """One extra object.

    Attributes:
        size: extents along x, y (height) and z in metres; None where the model's unit is not certain.
        label: one of `household_classes()` where it is certainly that, else None.
    """

    size: tuple[float, float, float] | None
    label: str | None

    @property
    def extents(self) -> tuple[float, ...] | None:
        """As of every object."""
        return self.size


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
