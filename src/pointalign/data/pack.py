"""Packing a folder of 660K small .npy files into a few hundred Parquet shards, which `packed` reads.

A shard is written whole or not at all, and noted in a journal with the state of the files that it was made of, so that a
packing that was stopped goes on where it was, and one that is run again packs only the shards that have changed. A shard is a
stretch of the sorted ids: a new id changes its own and all that follow.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pointalign.data.objaverse import NumpyClouds
from pointalign.data.packed import INDEX_FILE, INDEX_VERSION, JOURNAL_FILE, NUMBERS, PackedClouds, Shard
from pointalign.errors import ConfigError, DataError
from pointalign.progress import progress, say
from pointalign.storage import taken_lock, write_text, written_file

BROKEN_FILE = "_broken_clouds.txt"
# 512 clouds of 8,192 coloured points are 100 MB; other readers of the shards take 64 of them (13 MB) at a time.
SHARD_CLOUDS = 512
GROUP_CLOUDS = 64
SCHEMA = pa.schema([("object_id", pa.string()), ("num_points", pa.int32()), ("points", pa.list_(pa.float32()))])


@dataclass
class _Packed:
    """What the journal says of a shard.

    Attributes:
        key: hash of the names, sizes and times of the files that it was made of.
        size, sha256: of the shard's bytes.
        clouds: object id, place of the first byte, points and channels of each cloud.
        broken: why a file could not be read, by object id.
        rounded: how many clouds held numbers that are no float32.
    """

    shard: str
    key: str
    size: int = 0
    sha256: str = ""
    clouds: list[list[Any]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    rounded: int = 0


def pack_clouds(folder: str | Path, out: str | Path, skip_broken: bool = False, readers: int = 8) -> dict[str, Any]:
    """Pack a folder of `{object_id}_8192.npy` files; run again, it goes on, and repeats nothing.

    Clouds are kept as float32, bit for bit; float64 is rounded to it, as the model does. The same files give the same
    bytes with the same pyarrow.

    Args:
        folder: of .npy files.
        out: folder for the shards and the index; `open_clouds` takes it, or its address after copying.
        skip_broken: leave broken files out; else the shards are written without them, but no index, so that nothing can
            train on an incomplete folder unknowingly.
        readers: files that are read at once.

    Returns:
        Counts of clouds, shards, bytes, broken and rounded clouds, and the fingerprint of `PackedClouds`.

    Raises:
        ConfigError: when `out` holds the clouds of another folder.
        DataError: when the folder holds no clouds or broken ones, a file cannot be written, or another process packs into
            `out`.
    """
    if readers < 1:
        raise ConfigError(f"--readers {readers} reads nothing; give 1 or more")
    clouds, target = NumpyClouds(folder), Path(out)
    try:
        with taken_lock(target / JOURNAL_FILE):
            shards = _pack_shards(clouds, target, skip_broken, readers)
            broken = {object_id: reason for shard in shards for object_id, reason in shard.broken.items()}
            _list_broken(target, broken, len(clouds), skip_broken)
            if not (target / INDEX_FILE).is_file():
                _write_index(target / INDEX_FILE, shards)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot write {target} ({reason}); free some space, and run the same again") from error
    return {
        "out": str(target),
        "clouds": len(clouds) - len(broken),
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "broken": len(broken),
        "rounded": sum(shard.rounded for shard in shards),
        "fingerprint": PackedClouds(target).fingerprint,
    }


def _pack_shards(clouds: NumpyClouds, out: Path, skip_broken: bool, readers: int) -> list[_Packed]:
    object_ids = list(clouds)
    states = clouds.states(object_ids, gone=True)  # its shard tells that it is broken
    plan = {
        f"clouds-{start // SHARD_CLOUDS:05d}.parquet": slice(start, start + SHARD_CLOUDS)
        for start in range(0, len(object_ids), SHARD_CLOUDS)
    }
    keys = {name: _key(states[part]) for name, part in plan.items()}
    done = {
        name: shard
        for name, shard in _open_journal(out, clouds.folder).items()
        if keys.get(name) == shard.key and (skip_broken or not shard.broken) and _size(out / name) == shard.size
    }
    stale = [path for path in out.glob("clouds-*.parquet") if path.name not in plan]
    # What a killed process was writing.
    for name in ("clouds-*.parquet", INDEX_FILE, JOURNAL_FILE, BROKEN_FILE):
        stale += out.glob(f".????????????-{name}")
    if stale or len(done) < len(plan):
        (out / INDEX_FILE).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    left = sum(len(object_ids[part]) for name, part in plan.items() if name not in done)
    if done:
        say(f"{len(done)} of {len(plan)} shards are packed already")
    with ThreadPoolExecutor(readers) as pool, progress("packing clouds", left) as advance:
        for name, part in plan.items():
            if name not in done:
                done[name] = _Packed(name, keys[name])
                with written_file(out / name) as temporary:
                    _write_shard(
                        done[name], temporary, object_ids[part], partial(pool.map, partial(_read, clouds)), advance
                    )
                with (out / JOURNAL_FILE).open("a", encoding="utf-8") as journal:
                    journal.write(json.dumps(asdict(done[name])) + "\n")
    return [done[name] for name in plan]


def _key(states: Iterable[tuple[str, int, int]]) -> str:
    return hashlib.sha256(repr([INDEX_VERSION, SHARD_CLOUDS, GROUP_CLOUDS, *states]).encode()).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _open_journal(out: Path, folder: Path) -> dict[str, _Packed]:
    """What earlier runs have packed here, by shard; a line that was being written when a run was killed is left out.

    Raises:
        ConfigError: when they packed another folder.
    """
    path, head = out / JOURNAL_FILE, {"folder": str(folder.resolve()), "version": INDEX_VERSION}
    if not path.is_file():
        if any(out.glob("clouds-*.parquet")):
            raise ConfigError(
                f"{out} holds shards but no {JOURNAL_FILE}, so they cannot be gone on with; name another --out"
            )
        write_text(path, json.dumps(head) + "\n")
        return {}
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    if not lines or lines[0] != head:
        raise ConfigError(
            f"{out} was packed from another folder than {folder}, or in another layout; name another --out"
        )
    packed = {line["shard"]: _Packed(**line) for line in lines[1:]}
    # Written anew, so that the next line starts at the beginning of one.
    write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *map(asdict, packed.values()))))
    return packed


def _read(clouds: NumpyClouds, object_id: str) -> np.ndarray | DataError:
    try:
        return clouds[object_id]
    except DataError as error:
        return error


def _write_shard(
    shard: _Packed,
    path: Path,
    object_ids: Sequence[str],
    read: Callable[[Sequence[str]], Iterable[np.ndarray | DataError]],
    advance: Callable[[int], None],
) -> None:
    """Write the file, and fill in what the journal says of it."""
    written: list[np.ndarray] = []
    # Plain numbers, in one page a group: so each cloud's bytes lie in one piece. They would hardly compress either.
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": ["object_id"]}
    with pq.ParquetWriter(path, SCHEMA, data_page_size=2**30, **options) as writer:
        for start in range(0, len(object_ids), GROUP_CLOUDS):
            group = object_ids[start : start + GROUP_CLOUDS]
            whole = {}
            for object_id, points in zip(group, read(group), strict=True):
                if isinstance(points, DataError):
                    shard.broken[object_id] = str(points)
                    continue
                with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as such in training
                    whole[object_id] = np.ascontiguousarray(points, NUMBERS)
                shard.rounded += not np.array_equal(whole[object_id], points, equal_nan=True)
            if whole:
                writer.write_table(_table(whole))
            shard.clouds += [[object_id, 0, *points.shape] for object_id, points in whole.items()]
            written += whole.values()
            advance(len(group))
    with path.open("rb") as file:
        shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard.size = file.tell()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = 0
            for entry, points in zip(shard.clouds, written, strict=True):
                entry[1] = _find(content, points.tobytes(), place, path)
                place = entry[1] + points.nbytes


def _table(clouds: dict[str, np.ndarray]) -> pa.Table:
    ends = np.cumsum([0, *(points.size for points in clouds.values())], dtype=np.int32)
    values = np.concatenate([points.ravel() for points in clouds.values()])
    columns = [list(clouds), [len(points) for points in clouds.values()], pa.ListArray.from_arrays(ends, values)]
    return pa.table(columns, schema=SCHEMA)


def _find(content: mmap.mmap, wanted: bytes, start: int, path: Path) -> int:
    """Where a cloud's bytes lie, at or after a place; found by looking, so that what is read later is what was written."""
    place = content.find(wanted[:64], start)
    while place >= 0 and content[place : place + len(wanted)] != wanted:
        place = content.find(wanted[:64], place + 1)
    if place < 0:
        raise DataError(f"{path.name}: this version of pyarrow does not write plain numbers; install another one")
    return place


def _list_broken(out: Path, broken: dict[str, str], count: int, skip_broken: bool) -> None:
    """Name every broken file, and refuse them unless they are to be left out."""
    if not broken:
        (out / BROKEN_FILE).unlink(missing_ok=True)
        return
    write_text(out / BROKEN_FILE, "".join(f"{object_id}\t{reason}\n" for object_id, reason in broken.items()))
    told = f"{len(broken)} of {count} clouds could not be read (first: {next(iter(broken.values()))})"
    if not skip_broken or len(broken) == count:
        raise DataError(
            f"{told}; all are named in {out / BROKEN_FILE}, the others are packed: mend them and run the same again, or add "
            "--skip-broken"
        )
    say(f"{told}; left out, all are named in {out / BROKEN_FILE}")


def _write_index(path: Path, shards: Sequence[_Packed]) -> None:
    object_ids, places, points, channels = zip(*(cloud for shard in shards for cloud in shard.clouds), strict=True)
    files = [Shard(shard.shard, shard.size, shard.sha256) for shard in shards]
    table = pa.table(
        {
            "object_id": pa.array(object_ids, pa.string()),
            "shard": pa.array(np.repeat(np.arange(len(shards)), [len(shard.clouds) for shard in shards]), pa.int32()),
            "offset": pa.array(places, pa.int64()),
            "num_points": pa.array(points, pa.int32()),
            "channels": pa.array(channels, pa.int8()),
        }
    ).replace_schema_metadata({"pointalign": json.dumps({"version": INDEX_VERSION, "shards": files})})
    with written_file(path) as temporary:
        pq.write_table(table, temporary)
