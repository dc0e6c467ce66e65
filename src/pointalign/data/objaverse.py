"""Objaverse clouds as the field keeps them: one `{object_id}_8192.npy` per object, 660K of them in one folder."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pointalign.errors import DataError
from pointalign.progress import progress

# Source: PointLLM (arXiv 2308.16911), released data: these two have broken colours and are left out by the field.
BROKEN_OBJECTS = frozenset({"6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"})
# PointLLM's list of held-out objects, which lies beside its instructions.
VAL_3000_FILE = "val_object_ids_3000.txt"
# On network storage every question about a file waits for the network, so several are asked at once.
ASKERS = 8
PIECE = 1000


class NumpyClouds:
    """A folder of `{object_id}_{points}.npy` files, (N, 6): xyz, then rgb in [0, 1]; or (N, 3).

    Of an object's several files the last by name counts. Hidden files are passed over.

    Args:
        folder: where the files lie.

    Raises:
        DataError: when the folder does not exist or holds no such file.

    Source: PointLLM (arXiv 2308.16911), released data.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(
                f"no folder {self.folder}; give one that holds {{object_id}}_8192.npy files, or `household`"
            )
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".npy"))
        self._fingerprint: str | None = None
        self._endings: dict[str, str] = {}
        for name in names:
            object_id, mark, ending = name.rpartition("_")
            if mark and not name.startswith("."):
                self._endings[object_id] = sys.intern(ending)
        if not self._endings:
            raise DataError(f"{self.folder} holds no {{object_id}}_8192.npy file; check the path")

    def __len__(self) -> int:
        return len(self._endings)

    def __iter__(self) -> Iterator[str]:
        """Object ids, in the order of their files' names."""
        return iter(self._endings)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._endings

    def file(self, object_id: str) -> Path:
        """The object's file.

        Raises:
            DataError: when there is none.
        """
        if object_id not in self._endings:
            raise DataError(f"{self.folder} has no cloud of object {object_id}; complete the folder")
        return self.folder / f"{object_id}_{self._endings[object_id]}"

    def states(self, object_ids: Sequence[str], gone: bool = False) -> list[tuple[str, int, int]]:
        """Name, size in bytes and time of change in nanoseconds of each object's file.

        Args:
            object_ids: which objects.
            gone: take a file that is not there, as behind a link to nowhere, for one of size -1.

        Raises:
            DataError: when a file cannot be looked at.
        """
        try:
            with ThreadPoolExecutor(ASKERS) as pool:
                pieces = [object_ids[start : start + PIECE] for start in range(0, len(object_ids), PIECE)]
                with progress("looking at clouds", len(object_ids), patience=2.0) as advance:
                    states = []
                    for piece in pool.map(partial(self._states, gone=gone), pieces):
                        states += piece
                        advance(len(piece))
                    return states
        except OSError as error:
            raise DataError(f"cannot look at {error.filename}: {error.strerror}; copy it again") from error

    def _states(self, object_ids: Sequence[str], gone: bool) -> list[tuple[str, int, int]]:
        found = []
        for object_id in object_ids:
            name = f"{object_id}_{self._endings[object_id]}"
            try:
                status = os.stat(f"{self.folder}/{name}")
                found.append((name, status.st_size, status.st_mtime_ns))
            except FileNotFoundError:
                if not gone:
                    raise
                found.append((name, -1, 0))
        return found

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size, _ in self.states(list(self)))

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times, as they are when it is first asked for."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, size, changed in self.states(list(self)):
                digest.update(f"{name} {size} {changed}\n".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points.

        Raises:
            DataError: when the file is missing, broken, or holds anything but numbers of shape (N, 3) or (N, 6).
        """
        path = self.file(object_id)
        try:
            with path.open("rb") as file:
                points = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path} is broken ({reason}); copy it again") from error
        if points.dtype.kind not in "fiu":
            raise DataError(f"{path} is broken (it holds {points.dtype}, not numbers); copy it again")
        if points.ndim != 2 or points.shape[1] not in (3, 6):
            raise DataError(
                f"{path} holds an array of shape {points.shape}, but a point cloud has shape (points, 3) or (points, 6), "
                "xyz and rgb; copy it again"
            )
        return points
