"""Clouds packed into Parquet shards, read one by one by object id from a disk or from network storage.

`pack` writes the folder. Its shards hold each cloud's numbers plain and in one piece, so that a cloud is one read of its
own bytes: the index says where they lie. Anything that reads Parquet can open the shards without the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pointalign.errors import DataError, MissingDependencyError

# Readers of Parquet folders pass over names that begin with an underscore, and over other endings.
INDEX_FILE = "_clouds.index"
JOURNAL_FILE = "_pack.jsonl"
INDEX_VERSION = 1
NUMBERS = np.dtype("<f4")


class Shard(NamedTuple):
    """One Parquet file of a packed folder: its name, size in bytes, and the SHA-256 of its bytes."""

    name: str
    size: int
    sha256: str


class PackedClouds:
    """A folder that `pack_clouds` wrote: float32 clouds (N, 3) or (N, 6) by object id.

    Args:
        source: the folder, or its address in any form that fsspec knows (`s3://bucket/clouds`, `memory://clouds`, ...).

    Raises:
        DataError: when the folder or a shard is missing, not whole, or cannot be reached.
        MissingDependencyError: when the kind of address needs a package that is not installed.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.source)
            content = self._files.cat_file(f"{self._root}/{INDEX_FILE}")
            self._check_shards(content)
        except (DataError, MissingDependencyError):
            raise
        except ImportError as error:
            raise MissingDependencyError(f"cannot open {self.source}: {_reason(error)}; pip install it") from error
        except FileNotFoundError as error:
            raise DataError(
                f"{self.source} holds no {INDEX_FILE}, so it is no finished packed folder; give the folder that "
                "`pointalign data pack` wrote, and run that to its end"
            ) from error
        except Exception as error:  # each kind of storage has its own errors
            raise DataError(
                f"cannot read {self.source} ({_reason(error)}); check the address and your access"
            ) from error

    def _check_shards(self, content: bytes) -> None:
        """Take the index, and see that all shards are there and of the right size."""
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read()
            values = json.loads((table.schema.metadata or {})[b"pointalign"])
            version, shards = values["version"], [Shard(*shard) for shard in values["shards"]]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.source}/{INDEX_FILE} is broken ({_reason(error)}); copy it again") from error
        if version != INDEX_VERSION:
            raise DataError(f"{self.source} was packed in layout {version}, not {INDEX_VERSION}; pack it again")
        there = {entry["name"].rpartition("/")[2]: entry["size"] for entry in self._files.ls(self._root, detail=True)}
        wrong = [shard.name for shard in shards if there.get(shard.name) != shard.size]
        if wrong:
            raise DataError(
                f"{len(wrong)} of {len(shards)} shards of {self.source} are missing or not whole (first: {wrong[0]}); "
                "copy them again"
            )
        self.shards = shards
        self.fingerprint: str = hashlib.sha256(content).hexdigest()
        """Hash of the index, which holds the hash of each shard."""
        self._row = {object_id: row for row, object_id in enumerate(table["object_id"].to_pylist())}
        self._columns: dict[str, np.ndarray] = {
            name: table[name].to_numpy() for name in ("shard", "offset", "num_points", "channels")
        }

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[str]:
        """Object ids, in the order of the shards."""
        return iter(self._row)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._row

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards)

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points, float32 (N, 3) or (N, 6).

        Raises:
            DataError: when there is no such object, or its shard cannot be read.
        """
        row = self._row.get(object_id)
        if row is None:
            raise DataError(f"{self.source} has no cloud of object {object_id}; complete the folder and pack it again")
        shard, offset, *shape = (int(self._columns[name][row]) for name in self._columns)
        values = self._read(f"{self._root}/{self.shards[shard].name}", offset, shape[0] * shape[1])
        return values.reshape(shape)

    def _read(self, path: str, offset: int, count: int) -> np.ndarray:
        try:
            if isinstance(self._files, LocalFileSystem):
                # Opened anew each time: no open file is held, and processes and threads cannot disturb each other.
                values = np.fromfile(path, NUMBERS, count, offset=offset)
            else:
                content: Any = self._files.cat_file(path, start=offset, end=offset + count * NUMBERS.itemsize)
                values = np.frombuffer(content, NUMBERS).copy()
        except Exception as error:  # each kind of storage has its own errors
            raise DataError(f"cannot read {path} of {self.source} ({_reason(error)}); copy it again") from error
        if len(values) != count:
            raise DataError(f"{path} of {self.source} is cut short; copy it again")
        return values


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
