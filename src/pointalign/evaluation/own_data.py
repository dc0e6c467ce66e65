"""A user's own data: a folder of clouds, and a CSV or JSON file that says what each object is."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.data.files import load_point_cloud
from pointalign.data.files.cloud import PointCloud, turned_up
from pointalign.data.files.source import FORMATS
from pointalign.errors import DataError
from pointalign.options import AS_THE_FILE_SAYS, Reading
from pointalign.storage import writable

NUMPY = ".npy"
LAYOUT = "object_id and label, caption or both"
# Of a 3D file, as many as the field's clouds hold; the processor takes what its model reads.
READ_POINTS = 8192


class FolderClouds:
    """Clouds of a folder by object id: `{object_id}.npy` (or `{object_id}_8192.npy`), or any other 3D file.

    Args:
        folder: where the files lie.
        reading: how they become clouds. Of `.npy` files columns are taken as the field's (xyz, rgb, unit), and all points,
            where no format, columns or color_max are given.

    Raises:
        DataError: when the folder does not exist or holds no such file, or an object has two.
    """

    def __init__(self, folder: str | Path, reading: Reading = AS_THE_FILE_SAYS) -> None:
        self.folder, self.reading = Path(folder), reading
        if not self.folder.is_dir():
            raise DataError(f"no folder {self.folder}; give one that holds {{object_id}}.npy or other 3D files")
        shown = (path for path in sorted(self.folder.iterdir()) if not path.name.startswith("."))
        files = [path for path in shown if path.suffix.lower().lstrip(".") in FORMATS]
        if not files:
            raise DataError(f"{self.folder} holds no {{object_id}}.npy and no other 3D file; check the path")
        named: dict[str, Path] = {}
        for path in files:
            if named.setdefault(path.stem, path) != path:
                raise DataError(f"{named[path.stem]} and {path.name} are about one object; keep one of them")
        counted = {path: path.stem.rpartition("_")[0] for path in files if _is_counted(path)}
        # chair_1.npy and chair_2.npy are two objects, and none of them is `chair`.
        once = Counter(counted.values())
        self.files = {**{name: path for path, name in counted.items() if once[name] == 1}, **named}

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times, and of how they are read."""
        states = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in self.files.values()]
        if self.reading != AS_THE_FILE_SAYS:
            states.append(repr(self.reading))
        return hashlib.sha256("\n".join(states).encode()).hexdigest()

    def __contains__(self, object_id: object) -> bool:
        return object_id in self.files

    def __getitem__(self, object_id: str) -> np.ndarray | PointCloud:
        """The object's points, with their unit where the file tells it.

        Raises:
            DataError: when the file is missing or broken.
        """
        if object_id not in self.files:
            raise DataError(f"{self.folder} has no cloud of object {object_id}; complete the folder")
        path = self.files[object_id]
        told = self.reading
        if path.suffix.lower() != NUMPY or told.format or told.columns or told.color_max is not None:
            return load_point_cloud(path, **told.options(READ_POINTS))
        try:
            points = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is broken ({error}); copy it again") from error
        return points if points.ndim != 2 or points.shape[1] not in (3, 6, 7) else _as_told(points, told, str(path))


def _as_told(points: np.ndarray, told: Reading, source: str) -> np.ndarray | PointCloud:
    """A cloud (N, 3), (N, 6) or (N, 7) with y up and its unit, where they are told; its colours stay what they are."""
    if told.up == "z":
        points = np.concatenate([turned_up(points[:, :3]), points[:, 3:]], axis=1)
    if told.unit is None:
        return points
    if points.shape[1] == 3:
        return PointCloud(points.astype(np.float32), None, source, unit=told.unit)
    return np.concatenate([points[:, :6], np.full((len(points), 1), told.unit, np.float32)], axis=1)


def _is_counted(path: Path) -> bool:
    """Whether the name ends in a number of points, as the field's clouds do."""
    return path.suffix.lower() == NUMPY and path.stem.rpartition("_")[2].isdigit()


@dataclass(frozen=True)
class Truth:
    """What a user's file says of the objects.

    Args:
        labels: class by object id; empty when the file has no labels.
        captions: caption by object id; empty when the file has no captions.
    """

    labels: dict[str, str]
    captions: dict[str, str]


def read_truth(path: str | Path) -> Truth:
    """Read labels and captions: a CSV file with a header, or a JSON list of objects, with object_id and label or caption.

    Raises:
        DataError: when the file is missing, broken or empty, has other columns, lists an object twice or leaves one blank.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a CSV or JSON file of {LAYOUT}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text)
    if not rows:
        raise DataError(f"{path} lists no object; give one row each with {LAYOUT}")
    counts = Counter(row["object_id"] for row in rows)
    if "" in counts:
        raise DataError(f"{path} has {counts['']} rows without an object_id; name every object")
    twice = [object_id for object_id, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]} twice; keep one row per object")
    return Truth(_column(rows, "label", path), _column(rows, "caption", path))


def _csv_rows(path: Path, text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name or "" for name in reader.fieldnames or ()]
    if "object_id" not in columns or not {"label", "caption"} & set(columns):
        raise DataError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; it needs {LAYOUT}, separated by commas"
        )
    try:
        return [{**row, "object_id": (row["object_id"] or "").strip()} for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; look for a quote that is not closed") from error


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again") from error
    wanted = isinstance(rows, list) and all(isinstance(row, Mapping) and "object_id" in row for row in rows)
    if not wanted or not all({"label", "caption"} & row.keys() for row in rows):
        raise DataError(f"{path} is not a JSON list of objects with {LAYOUT}; rewrite it so")
    return [{**row, "object_id": str(row["object_id"]).strip()} for row in rows]


def _column(rows: list[dict[str, Any]], name: str, path: Path) -> dict[str, str]:
    if not any(name in row for row in rows):
        return {}
    values = {row["object_id"]: row.get(name) for row in rows}
    found = {
        object_id: "" if value is None or value != value else writable(str(value).strip())  # NaN: nothing, of pandas
        for object_id, value in values.items()
    }
    blank = [object_id for object_id, value in found.items() if not value]
    if blank:
        raise DataError(
            f"{path} gives no {name} for {len(blank)} of {len(rows)} objects (first: {blank[0]}); fill it in"
        )
    return found


def read_classes(path: str | Path) -> list[str]:
    """Read the names of a closed set, one per line.

    Raises:
        DataError: when the file is missing, empty, or names a class twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a text file with one class per line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise DataError(f"{path} {f'names {twice[0]} twice' if twice else 'is empty'}; give one class per line")
    return names
