"""What of the field's data a folder holds: file by file, what is missing, broken, and where it is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pointalign.data.conversations import read_conversations
from pointalign.data.modelnet import MODELNET_FILE, load_modelnet40
from pointalign.data.objaverse import BROKEN_OBJECTS, VAL_3000_FILE
from pointalign.data.sources import open_clouds
from pointalign.errors import DataError
from pointalign.storage import write_text

PUBLISHED = "Hugging Face dataset RunsenXu/PointLLM"
CLOUD_FOLDERS = ("objaverse_data", "8192_npy")
NUM_POINTS = 8192
SAMPLED_CLOUDS = 20


@dataclass(frozen=True)
class Expected:
    """One file of the layout.

    Attributes:
        name: path inside the folder.
        purpose: what it is needed for.
        needed: whether the layout is incomplete without it.
        count: how many objects it is about, where that is fixed.
        published: where it can be had.
    """

    name: str
    purpose: str
    needed: bool = True
    count: int | None = None
    published: str = PUBLISHED


# Source: PointLLM (arXiv 2308.16911), released data.
CLOUDS = Expected(
    f"{CLOUD_FOLDERS[0]}/",
    "training, Objaverse evaluation",
    published=f"{PUBLISHED}, Objaverse_660K_8192_npy_split_a* (parts of one archive)",
)
INSTRUCTIONS = (
    Expected("anno_data/PointLLM_brief_description_660K_filtered.json", "MiniGPT-3D stages I and II"),
    Expected("anno_data/PointLLM_brief_description_660K.json", "captions of all 3,000 held-out objects", needed=False),
    Expected("anno_data/PointLLM_complex_instruction_70K.json", "MiniGPT-3D stages III and IV, PointAlign"),
    Expected("anno_data/PointLLM_brief_description_val_200_GT.json", "Objaverse evaluation", count=200),
)
HELD_OUT = Expected(f"anno_data/{VAL_3000_FILE}", "the held-out objects, which no training may see", count=3000)
MODELNET = Expected(f"modelnet40_data/{MODELNET_FILE}", "ModelNet40 evaluation", count=2468)


@dataclass(frozen=True)
class Finding:
    """What was found of one file.

    Attributes:
        file: its path.
        state: "present", "missing" or "wrong".
        bytes: its size, of a folder its clouds'.
        needed, purpose, published: as expected.
        detail: what it holds, or what is wrong with it.
    """

    file: str
    state: str
    bytes: int
    needed: bool
    purpose: str
    published: str
    detail: str


def check_data(folder: str | Path, clouds: str | None = None, listed: Path | None = None) -> dict[str, Any]:
    """Hold a folder against the layout of the field's data, and show what was found as a table on stderr.

    Files are read to their end; of the clouds a sample is. Of the objects that the instruction files name, those without
    cloud are counted, apart from the two whose published colours are broken.

    Args:
        folder: the layout's root.
        clouds: folder or address of the clouds, when they do not lie in it.
        listed: file for the names of all objects without cloud.

    Returns:
        `complete`, `files` (one dict a file), `missing_clouds`, `first_missing`, and `list`.

    Raises:
        DataError: when there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"no folder {root}; make it, and run the same again to see what belongs in it")
    findings, wanted = [], set()
    for expected in INSTRUCTIONS:
        path = root / expected.name
        findings.append(
            _look(path, expected, lambda path=path, expected=expected: _instructions(path, expected, wanted))
        )
    findings.append(_look(root / HELD_OUT.name, HELD_OUT, lambda: _held_out(root / HELD_OUT.name)))
    findings.append(_look(root / MODELNET.name, MODELNET, lambda: _modelnet(root / MODELNET.name)))
    source = clouds or next((str(root / name) for name in CLOUD_FOLDERS if (root / name).is_dir()), None)
    missing: list[str] = []
    findings.insert(0, _clouds(source or str(root / CLOUDS.name), wanted, missing))
    if listed is not None:
        write_text(listed, "".join(f"{name}\n" for name in missing))
    _show(findings, root)
    return {
        "folder": str(root),
        "complete": all(
            found.state == "present" or (found.state == "missing" and not found.needed) for found in findings
        ),
        "files": [asdict(found) for found in findings],
        "missing_clouds": len(missing),
        "first_missing": missing[:10],
        "list": str(listed) if listed else None,
    }


def _look(path: Path, expected: Expected, read: Callable[[], str]) -> Finding:
    given = (expected.needed, expected.purpose, expected.published)
    if not path.is_file():
        return Finding(str(path), "missing", 0, *given, f"get it from {expected.published}")
    size = path.stat().st_size
    try:
        return Finding(str(path), "present", size, *given, read())
    except DataError as error:
        return Finding(str(path), "wrong", size, *given, str(error))


def _instructions(path: Path, expected: Expected, wanted: set[str]) -> str:
    conversations = read_conversations(path)
    object_ids = conversations.object_ids
    wanted.update(object_ids)
    if expected.count not in (None, len(object_ids)):
        raise DataError(f"{path} is about {len(object_ids)} objects, not {expected.count}; copy it again")
    return f"{len(conversations):,} conversations about {len(object_ids):,} objects"


def _held_out(path: Path) -> str:
    try:
        object_ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is broken ({error}); copy it again") from error
    if len(set(object_ids)) != HELD_OUT.count:
        raise DataError(f"{path} names {len(set(object_ids))} objects, not {HELD_OUT.count}; copy it again")
    return f"{len(object_ids):,} object ids"


def _modelnet(path: Path) -> str:
    objects = load_modelnet40(path)
    sizes = {len(thing.xyz) for thing in objects}
    if len(objects) != MODELNET.count or sizes != {NUM_POINTS}:
        raise DataError(
            f"{path} holds {len(objects)} clouds of {', '.join(map(str, sorted(sizes)))} points, not {MODELNET.count} of "
            f"{NUM_POINTS}; copy it again"
        )
    return f"{len(objects):,} clouds of {len({thing.label for thing in objects})} classes"


def _clouds(source: str, wanted: set[str], missing: list[str]) -> Finding:
    """Look at the clouds, and add the objects without one to `missing`."""
    given = (CLOUDS.needed, CLOUDS.purpose, CLOUDS.published)
    needed = sorted(wanted - BROKEN_OBJECTS)
    if "://" not in source and not Path(source).is_dir():
        missing += needed
        return Finding(source, "missing", 0, *given, f"get them from {CLOUDS.published}, or give --clouds")
    try:
        clouds = open_clouds(source)
        missing += [object_id for object_id in needed if object_id not in clouds]
        size, object_ids = clouds.num_bytes, list(clouds)
    except DataError as error:
        missing += needed
        return Finding(source, "wrong", 0, *given, str(error))
    try:
        sampled = object_ids[:: -(-len(object_ids) // SAMPLED_CLOUDS)]
        for object_id in sampled:
            _check_cloud(clouds[object_id], f"the cloud of {object_id} in {source}")
    except DataError as error:
        return Finding(source, "wrong", size, *given, str(error))
    detail = f"{len(object_ids):,} clouds, {len(sampled)} of them read"
    if missing:
        told = f"{len(missing):,} of {len(needed):,} objects that the instruction files name have none"
        return Finding(source, "wrong", size, *given, f"{detail}; {told} (first: {', '.join(missing[:3])})")
    return Finding(source, "present", size, *given, detail)


def _check_cloud(points: np.ndarray, where: str) -> None:
    if points.shape != (NUM_POINTS, 6):
        raise DataError(f"{where} has shape {points.shape}, not ({NUM_POINTS}, 6); copy it again")
    if not np.isfinite(points).all():
        raise DataError(f"{where} holds NaN or infinite values; copy it again")
    if points[:, 3:].min() < 0 or points[:, 3:].max() > 1:
        raise DataError(f"{where} has colours outside [0, 1]; copy it again")


COLORS = {"present": "green", "missing": "red", "wrong": "red"}


def _show(findings: Sequence[Finding], root: Path) -> None:
    table = Table("state", "size", "file, what it is needed for, and what was found", box=None, pad_edge=False)
    for found in findings:
        optional = found.state == "missing" and not found.needed
        state = Text("optional", "yellow") if optional else Text(found.state, COLORS[found.state])
        told = Text.assemble(
            (found.file.removeprefix(f"{root}/"), "bold"),
            f"\n{found.purpose}\n",
            (found.detail, "dim"),
            overflow="fold",
        )
        table.add_row(state, decimal(found.bytes) if found.bytes else "", told)
    Console(stderr=True).print(table)
