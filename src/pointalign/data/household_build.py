"""How the bundled `household` file is made from the Debian package sweethome3d-furniture.

Each model is scaled to the size its catalogue gives, sampled into 8,192 coloured points, and thinned to 2,048 in
farthest-point order. Labels, families and with them the split come from a reviewed table, not from code.
"""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import trimesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trimesh.resolvers import ZipResolver

from pointalign.data.files.meshes import mesh_parts, read_mesh, sample_mesh
from pointalign.data.household import LABELS_FILE, NUM_POINTS, XYZ_SCALE, LabelRow, read_labels
from pointalign.data.household_catalog import (
    NOTICE_MARK,
    PACKAGE_HELP,
    CatalogEntry,
    notice_text,
    open_archive,
    read_catalogs,
)
from pointalign.data.household_split import assign_splits
from pointalign.errors import DataError
from pointalign.geometry import farthest_point_sample, normalize_point_cloud
from pointalign.storage import write_text, written_file

NUM_SAMPLED = 8192
FPS_BATCH = 8
XYZ_VALUES = 3 * NUM_POINTS


def build_household(
    source: str | Path, out: str | Path, notice: str | Path | None = None, labels: str | Path | None = None
) -> dict[str, int]:
    """Build the Parquet file of the household objects; the same source gives the same bytes.

    Args:
        source: folder with the five .sh3f files of the Debian package sweethome3d-furniture 1.8-1.
        out: the Parquet file to write.
        notice: also write the attribution of every object into this file, after its line NOTICE_MARK.
        labels: the table of labels and families; the bundled one when None.

    Returns:
        How many objects were written, in all and per split.

    Raises:
        DataError: when the source is missing or broken, or the table of labels does not fit it.
    """
    entries = read_catalogs(source)
    table = read_labels(labels or LABELS_FILE)
    missing = sorted({e.id for e in entries} ^ table.keys())
    if missing:
        raise DataError(f"source and labels disagree on {len(missing)} objects, first {missing[0]}; use 1.8-1 of both")
    splits = assign_splits(table.values())
    clouds = [cloud for _, cloud in sample_catalog(source, entries)]
    with written_file(Path(out)) as temporary:
        _write_parquet(temporary, entries, table, splits, clouds)
    if notice is not None:
        _write_notice(notice, entries)
    counts = Counter(splits.values())
    return {"objects": len(entries), "train": counts["train"], "test": counts["test"]}


def sample_catalog(source: str | Path, entries: Sequence[CatalogEntry]) -> Iterator[tuple[CatalogEntry, np.ndarray]]:
    """Yield each entry with its quantised cloud.

    A cloud is (NUM_POINTS, 6) int32 in farthest-point order: xyz in [-XYZ_SCALE, XYZ_SCALE], rgb in [0, 255].

    Raises:
        DataError: when a model is missing in its archive or cannot be read.
    """
    archives = {e.collection.file: open_archive(Path(source) / e.collection.file) for e in entries}
    folders: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for file, archive in archives.items():
        for name in archive.namelist():
            folders[file, posixpath.dirname(name)].append(name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling models", total=len(entries), rate="")
        for start in range(0, len(entries), FPS_BATCH):
            batch = entries[start : start + FPS_BATCH]
            dense = [_sample_entry(e, archives[e.collection.file], folders) for e in batch]
            yield from zip(batch, thin_clouds(np.stack(dense)), strict=True)
            speed = progress.tasks[task].finished_speed or progress.tasks[task].speed
            progress.update(task, advance=len(batch), rate=f"{speed:.1f}/s" if speed else "")
    for archive in archives.values():
        archive.close()


class _ArchiveFolder(ZipResolver):
    """Finds what a model names in its own folder of the archive; where a path names another disk, its last word."""

    def get(self, name: str) -> bytes:
        if name not in self.keys():
            name = next((w for w in (posixpath.basename(name), name.split()[-1]) if w in self.keys()), name)
        return super().get(name)


def _sample_entry(
    entry: CatalogEntry, archive: zipfile.ZipFile, folders: dict[tuple[str, str], list[str]]
) -> np.ndarray:
    """(NUM_SAMPLED, 6) float32 points of a model as its author shows it: turned and scaled as the catalogue says."""
    folder = posixpath.dirname(entry.model)
    names = folders.get((entry.collection.file, folder), [])
    if entry.model not in names:
        raise DataError(f"{entry.collection.file} lacks {entry.model}; {PACKAGE_HELP}")
    files = {posixpath.basename(n): io.BytesIO(archive.read(n)) for n in names if not n.endswith("/")}
    where = f"{entry.model} in {entry.collection.file}"
    mesh = read_mesh(io.BytesIO(archive.read(entry.model)), "obj", _ArchiveFolder(files), where)
    turn = np.eye(4)
    turn[:3, :3] = entry.rotation
    mesh.apply_transform(turn)
    mesh.apply_transform(np.diag([*_scale_to_size(mesh, entry.size_cm), 1.0]))
    return sample_mesh(mesh, NUM_SAMPLED, seed=0)


def _scale_to_size(mesh: trimesh.Trimesh | trimesh.Scene, size_cm: Sequence[float]) -> np.ndarray:
    """Factors along x, y, z that give the mesh's box the catalogue's size; a flat axis keeps its extent of zero."""
    worn = np.concatenate([vertices[np.unique(part.faces)] for part, vertices in mesh_parts(mesh)])
    extent = np.ptp(worn, axis=0)
    return np.where(extent > 0, np.asarray(size_cm) / np.where(extent > 0, extent, 1.0), 1.0)


def thin_clouds(dense: np.ndarray) -> np.ndarray:
    """Quantise clouds (B, NUM_SAMPLED, 6) and keep NUM_POINTS of each in farthest-point order, as int32.

    The order is found on the quantised integers in float64, where every squared distance is exact: no machine's
    rounding can change it.
    """
    normal = normalize_point_cloud(torch.from_numpy(dense).double())
    xyz = (normal[..., :3] * XYZ_SCALE).round()
    rgb = (normal[..., 3:].clamp(0, 1) * 255).round()
    order = farthest_point_sample(xyz, NUM_POINTS)
    kept = torch.cat([xyz, rgb], dim=-1).gather(1, order.unsqueeze(-1).expand(-1, -1, 6))
    return kept.to(torch.int32).numpy()


def _write_parquet(
    path: Path,
    entries: Sequence[CatalogEntry],
    table: dict[str, LabelRow],
    splits: dict[str, str],
    clouds: Sequence[np.ndarray],
) -> None:
    columns = {
        "id": pa.array([e.id for e in entries]),
        "name": pa.array([e.name for e in entries]),
        "category": pa.array([e.category for e in entries]),
        "tags": pa.array([list(e.tags) for e in entries], pa.list_(pa.string())),
        "creator": pa.array([e.creator for e in entries]),
        "licence": pa.array([e.collection.licence for e in entries]),
        "source": pa.array([e.collection.name for e in entries]),
        "size_cm": pa.array([list(e.size_cm) for e in entries], pa.list_(pa.float32(), 3)),
        "label": pa.array([table[e.id].label for e in entries]),
        "noun": pa.array([table[e.id].noun for e in entries]),
        "family": pa.array([table[e.id].family for e in entries]),
        "split": pa.array([splits[e.id] for e in entries]),
    }
    write_clouds(path, columns, clouds)


def write_clouds(
    path: Path, columns: dict[str, pa.Array], clouds: Sequence[np.ndarray], compression_level: int = 19
) -> None:
    """Write a Parquet file of objects; the same values give the same bytes.

    Args:
        path: the file to write.
        columns: what is told of the objects.
        clouds: quantised clouds, as `thin_clouds` gives them; they become the columns xyz and rgb.
        compression_level: of zstd, 1 (quick) to 22 (small).
    """
    points = np.stack(clouds)
    xyz = pa.array(points[..., :3].astype(np.int16).ravel())
    rgb = pa.array(points[..., 3:].astype(np.uint8).ravel())
    columns = {
        **columns,
        "xyz": pa.FixedSizeListArray.from_arrays(xyz, XYZ_VALUES),
        "rgb": pa.FixedSizeListArray.from_arrays(rgb, XYZ_VALUES),
    }
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=len(points),
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=False,
        write_statistics=False,
        version="2.6",
        data_page_version="1.0",
    )


def _write_notice(notice: str | Path, entries: Sequence[CatalogEntry]) -> None:
    """Rewrite the part of a NOTICE file from the line NOTICE_MARK on; what stands above it is kept."""
    path = Path(notice)
    above = path.read_text(encoding="utf-8").split(f"{NOTICE_MARK}\n")[0] if path.is_file() else ""
    write_text(path, above + notice_text(entries))
