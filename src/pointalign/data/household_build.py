"""How the bundled `household` file is made from the Debian package sweethome3d-furniture.

Each model is scaled to the size its catalogue gives, sampled into 8,192 coloured points, and thinned to 2,048 in
farthest-point order. Labels, families and with them the split come from a reviewed table, not from code.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import trimesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trimesh.resolvers import ZipResolver

from pointalign.data.files import mesh_parts, read_mesh, sample_mesh
from pointalign.data.household import LABELS_FILE, NUM_POINTS, XYZ_SCALE, LabelRow, read_labels
from pointalign.errors import DataError
from pointalign.geometry import farthest_point_sample, normalize_point_cloud

PACKAGE_HELP = (
    "install the Debian package sweethome3d-furniture, or unpack it: apt-get download sweethome3d-furniture && "
    "dpkg -x sweethome3d-furniture_*.deb DIR, then give DIR/usr/share/sweethome3d/furniture"
)
CATALOG_FILE = "PluginFurnitureCatalog.properties"
NUM_SAMPLED = 8192
FPS_BATCH = 8
HELD_OUT_SHARE = 100 / 820
XYZ_VALUES = 3 * NUM_POINTS


@dataclass(frozen=True)
class Collection:
    """One catalogue of the package: its file, what it is called, who made it and under which licence."""

    file: str
    name: str
    licence: str
    licence_url: str
    copyright: str


COLLECTIONS = (
    Collection(
        "BlendSwap-CC-0.sh3f",
        "BlendSwap-CC-0",
        "CC0-1.0",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "2014 Emmanuel Puybaret / eTeks and the Blend Swap contributors",
    ),
    Collection(
        "BlendSwap-CC-BY.sh3f",
        "BlendSwap-CC-BY",
        "CC-BY-3.0",
        "https://creativecommons.org/licenses/by/3.0/",
        "the Blend Swap contributors",
    ),
    Collection(
        "KatorLegaz.sh3f",
        "KatorLegaz",
        "CC-BY-3.0-US",
        "https://creativecommons.org/licenses/by/3.0/us/",
        "2003-2008 Andrew Kator & Jennifer Legaz",
    ),
    Collection(
        "Reallusion.sh3f",
        "Reallusion",
        "CC-BY-3.0-US",
        "https://creativecommons.org/licenses/by/3.0/us/",
        "2008-2011 Reallusion, http://www.reallusion.com",
    ),
    Collection(
        "Scopia.sh3f",
        "Scopia",
        "CC-BY-3.0",
        "https://creativecommons.org/licenses/by/3.0/",
        "2010-2012 Scopia Visual Interfaces Systems, s.l., http://www.scopia.es",
    ),
)


@dataclass(frozen=True)
class CatalogEntry:
    """What a catalogue says of one model; `size_cm` is width, height, depth: the extents along x, y, z."""

    id: str
    name: str
    category: str
    tags: tuple[str, ...]
    creator: str
    collection: Collection
    size_cm: tuple[float, float, float]
    model: str
    rotation: np.ndarray


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
    write_atomically(out, lambda path: _write_parquet(path, entries, table, splits, clouds))
    if notice is not None:
        write_notice(notice, entries)
    counts = Counter(splits.values())
    return {"objects": len(entries), "train": counts["train"], "test": counts["test"]}


def read_catalogs(source: str | Path) -> list[CatalogEntry]:
    """All models that the catalogues in a folder list, ordered by id.

    Raises:
        DataError: when the folder or all its .sh3f files are missing, or one cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"no folder {source}; {PACKAGE_HELP}")
    absent = [c.file for c in COLLECTIONS if not (source / c.file).is_file()]
    if absent:
        raise DataError(f"{source} lacks {', '.join(absent)}; {PACKAGE_HELP}")
    entries: list[CatalogEntry] = []
    for collection in COLLECTIONS:
        with _open_archive(source / collection.file) as archive:
            try:
                text = archive.read(CATALOG_FILE).decode("latin-1")
            except KeyError:
                raise DataError(f"{source / collection.file} holds no {CATALOG_FILE}; {PACKAGE_HELP}") from None
            entries += _parse_catalog(text, collection)
    return sorted(entries, key=lambda entry: entry.id)


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"cannot open {path}: {error}; {PACKAGE_HELP}") from error


def parse_properties(text: str) -> dict[str, str]:
    """Keys and values of a Java .properties text (continued lines, escapes, `=` or `:`).

    Source: java.util.Properties.load, Java SE documentation.
    """
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\\r?\n[ \t]*", r"\1", text)
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*([^#!\s=:](?:\\.|[^=:\s\\])*)\s*[=:]?\s*(.*)", line)
        if match:
            found[_unescape(match[1])] = _unescape(match[2]).strip()
    return found


def _unescape(text: str) -> str:
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)


def _parse_catalog(text: str, collection: Collection) -> list[CatalogEntry]:
    rows: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for key, value in parse_properties(text).items():
        field, _, number = key.partition("#")
        if number.isdigit():
            rows[int(number)][field] = value
    entries = []
    for number, row in sorted(rows.items()):
        try:
            rotation = np.array([float(v) for v in row["modelRotation"].split()] if "modelRotation" in row else np.eye(3))
            entries.append(
                CatalogEntry(
                    id=re.sub(r"[^a-z0-9]+", "-", row["id"].lower()).strip("-"),
                    name=row["name"],
                    category=row["category"],
                    tags=tuple(t.strip() for t in row.get("tags", "").split(",") if t.strip()),
                    creator=row["creator"],
                    collection=collection,
                    size_cm=(float(row["width"]), float(row["height"]), float(row["depth"])),
                    model=row["model"].lstrip("/"),
                    rotation=rotation.reshape(3, 3),
                )
            )
        except (KeyError, ValueError) as error:
            where = f"{collection.file}, model {number}"
            raise DataError(f"{where}: the catalogue lacks or garbles {error}; {PACKAGE_HELP}") from error
    return entries


def sample_catalog(source: str | Path, entries: Sequence[CatalogEntry]) -> Iterator[tuple[CatalogEntry, np.ndarray]]:
    """Yield each entry with its quantised cloud (NUM_POINTS, 6) int32: xyz in [-XYZ_SCALE, XYZ_SCALE], rgb in [0, 255]."""
    archives = {e.collection.file: _open_archive(Path(source) / e.collection.file) for e in entries}
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
            yield from zip(batch, _thin(np.stack(dense)), strict=True)
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
    """(NUM_SAMPLED, 6) float32 points of the model as its author shows it: turned, and scaled to the catalogue's size."""
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


def _thin(dense: np.ndarray) -> np.ndarray:
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


def assign_splits(rows: Iterable[LabelRow], share: float = HELD_OUT_SHARE) -> dict[str, str]:
    """Hold out a share of the objects, stratified by label and never part of a family.

    Each label's quota is its share of the held-out places, rounded by largest remainder. Families are tried in the
    order of a hash of their name and taken while they fit the quota; places that no family of a label fits go to the
    labels with the most objects left.

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
    spare = sum(left.values())
    for name in sorted(order, key=lambda name: -sizes[families[name][0].label]):
        if name not in held and len(families[name]) <= spare:
            held.add(name)
            spare -= len(families[name])
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


def _write_parquet(
    path: Path,
    entries: Sequence[CatalogEntry],
    table: dict[str, LabelRow],
    splits: dict[str, str],
    clouds: Sequence[np.ndarray],
) -> None:
    points = np.stack(clouds)
    xyz = pa.array(points[..., :3].astype(np.int16).ravel())
    rgb = pa.array(points[..., 3:].astype(np.uint8).ravel())
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
        "family": pa.array([table[e.id].family for e in entries]),
        "split": pa.array([splits[e.id] for e in entries]),
        "xyz": pa.FixedSizeListArray.from_arrays(xyz, XYZ_VALUES),
        "rgb": pa.FixedSizeListArray.from_arrays(rgb, XYZ_VALUES),
    }
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=len(entries),
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        write_statistics=False,
        version="2.6",
        data_page_version="1.0",
    )


def write_atomically(out: str | Path, write) -> None:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
