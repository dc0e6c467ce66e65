"""The bundled real data set: 820 household objects as coloured clouds, each with a label, a licence and a creator.

Built from the Debian package sweethome3d-furniture by `household_build`; docs/household.md tells how.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pointalign.errors import DataError
from pointalign.geometry import normalize_point_cloud

ASSETS = Path(__file__).parent.parent / "assets"
HOUSEHOLD_FILE = ASSETS / "household.parquet"
LABELS_FILE = ASSETS / "household" / "labels.csv"
NUM_POINTS = 2048
# Stored xyz are integers; this one lies at distance 1 from the centre, so that half a step is 1.5e-5 of the radius.
XYZ_SCALE = 32767
SPLITS = ("train", "test")
# What surfaces without material were given when the file was built, in its 256 levels.
MISSING_COLOR = (128 / 255, 128 / 255, 128 / 255)


@dataclass(frozen=True)
class CatalogObject:
    """What is known of any object that a model may be trained on.

    Attributes:
        id: where it comes from and which it is there, in lower case, for instance "scopia-armchair1".
        name, category, tags: as its catalogue or package has them.
        creator: whom that names.
        licence: SPDX identifier.
        source: the collection or package.
        noun: what it is in plain English with its article, for instance "a corner sofa".
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
    noun: str
    family: str
    points: np.ndarray = field(repr=False, compare=False)

    @property
    def extents(self) -> tuple[float, ...] | None:
        """Along x (width), y (height) and z (depth) in metres; None where they are not known."""
        return None

    @property
    def sized_points(self) -> np.ndarray:
        """(2048, 7): the points, and in every row the unit of xyz in metres, 0 where the size is not known."""
        return with_unit(self.points, self.extents)


@dataclass(frozen=True)
class HouseholdObject(CatalogObject):
    """One bundled object.

    Attributes:
        size_cm: extents along x (width), y (height) and z (depth) in centimetres.
        label: one of `household_classes()`.
        split: "train" or "test".
    """

    size_cm: tuple[float, float, float]
    label: str
    split: str

    @property
    def extents(self) -> tuple[float, ...]:
        """As of every object; here they are known."""
        return tuple(extent / 100 for extent in self.size_cm)


def with_unit(points: np.ndarray, extents: Sequence[float] | None) -> np.ndarray:
    """A cloud with one more column, the unit of its xyz in metres.

    Args:
        points: (N, 6), of any scale.
        extents: of the object along x, y and z in metres; None where they are not known, and the unit becomes 0.

    Returns:
        (N, 7) float32. The unit is the longest extent over the cloud's own.
    """
    unit = 0.0 if extents is None else max(extents) / float(np.ptp(points[:, :3], axis=0).max())
    return np.concatenate([points, np.full((len(points), 1), unit, dtype=np.float32)], axis=1)


@dataclass(frozen=True)
class LabelRow:
    """One row of the reviewed table: what an object is, and which models it is nearly the same as."""

    id: str
    label: str
    family: str
    noun: str


def load_household(split: str | None = None, path: str | Path | None = None) -> list[HouseholdObject]:
    """Load the objects, ordered by id.

    Args:
        split: "train" (720 objects), "test" (100), or None for both.
        path: a file built by `build_household`; the bundled one when None.

    Raises:
        DataError: when the split is unknown, or the file is missing, broken or of another layout.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"household has no split {split!r}; use one of {', '.join(SPLITS)}")
    path = Path(path) if path is not None else HOUSEHOLD_FILE
    table = _read_table(path)
    if split is not None:
        table = table.filter(pa.array([row == split for row in table["split"].to_pylist()]))
    if table.num_rows == 0:
        return []
    clouds = read_clouds(table)
    rows = table.drop_columns(["xyz", "rgb"]).to_pylist()
    for row, cloud in zip(rows, clouds, strict=True):
        row.update(tags=tuple(row["tags"]), size_cm=tuple(row["size_cm"]), points=cloud)
    return [HouseholdObject(**row) for row in rows]


def _read_table(path: Path) -> pa.Table:
    return read_columns(path, [name for name in HouseholdObject.__dataclass_fields__ if name != "points"], "household")


def read_columns(path: Path, columns: Sequence[str], verb: str) -> pa.Table:
    """Columns of a Parquet file that one of the `pointalign data` verbs built, with its clouds in xyz and rgb.

    Raises:
        DataError: when the file is missing, broken or of another layout.
    """
    if not path.is_file():
        raise DataError(f"no {verb} file at {path}; build it with: pointalign data {verb} --source DIR --out FILE")
    try:
        with pq.ParquetFile(path) as file:  # pq.read_table would import pandas where it is installed
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}; the file is cut short or broken, build it again") from error
    absent = {*columns, "xyz", "rgb"} - set(table.column_names)
    if absent:
        raise DataError(f"{path} lacks the columns {', '.join(sorted(absent))}; build it again with this version")
    return table.select([*columns, "xyz", "rgb"])


def read_clouds(table: pa.Table) -> np.ndarray:
    """The clouds of a table as (rows, NUM_POINTS, 6) float32: xyz in the unit ball, rgb (sRGB) in [0, 1]."""
    clouds = np.empty((table.num_rows, NUM_POINTS, 6), dtype=np.float32)
    clouds[..., :3] = normalize_point_cloud(torch.from_numpy(_values(table["xyz"]).astype(np.float32)))
    np.divide(_values(table["rgb"]), np.float32(255), out=clouds[..., 3:])
    pa.default_memory_pool().release_unused()  # what reading took, three times the clouds, and would keep
    return clouds


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as (rows, NUM_POINTS, 3)."""
    flat = column.combine_chunks().flatten().to_numpy()
    if len(flat) != len(column) * 3 * NUM_POINTS:
        raise DataError(f"a cloud does not have {NUM_POINTS} points; build the file again with this version")
    return flat.reshape(-1, NUM_POINTS, 3)


def read_labels(path: str | Path = LABELS_FILE) -> dict[str, LabelRow]:
    """The reviewed table (columns id, label, family, noun) by object id.

    Raises:
        DataError: when the file is missing, lacks a column, or lists an object twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no table of labels at {path}; check the path")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(LabelRow.__dataclass_fields__)
        absent = set(columns) - set(reader.fieldnames or ())
        if absent:
            raise DataError(f"{path} lacks the columns {', '.join(sorted(absent))}; its header is {','.join(columns)}")
        rows = [LabelRow(*(row[name] for name in columns)) for row in reader]
    twice = [row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]} twice; keep one row per object")
    return {row.id: row for row in rows}


def household_classes() -> list[str]:
    """The closed set of labels, in alphabetical order."""
    return sorted({row.label for row in read_labels().values()})


def class_sizes(split: str | None = None) -> dict[str, int]:
    """How many objects of each class the bundled file holds, largest first; classes absent from the split count 0."""
    table = _read_table(HOUSEHOLD_FILE).select(["label", "split"]).to_pylist()
    counts = Counter(row["label"] for row in table if split in (None, row["split"]))
    return {name: counts[name] for name in sorted(household_classes(), key=lambda name: (-counts[name], name))}


def majority_rate(split: str | None = None) -> float:
    """The accuracy of always answering the largest class of the split."""
    sizes = class_sizes(split)
    return max(sizes.values()) / sum(sizes.values())
