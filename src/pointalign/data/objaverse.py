"""Objaverse clouds as the field keeps them: one `{object_id}_8192.npy` per object."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pointalign.errors import DataError


class NumpyClouds:
    """A folder of `{object_id}_{points}.npy` files, float (N, 6): xyz, then rgb in [0, 1].

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
        self.files = {path.stem.rpartition("_")[0]: path for path in sorted(self.folder.glob("*_*.npy"))}
        if not self.files:
            raise DataError(f"{self.folder} holds no {{object_id}}_8192.npy file; check the path")

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times."""
        digest = hashlib.sha256()
        for path in self.files.values():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def __contains__(self, object_id: object) -> bool:
        return object_id in self.files

    def __getitem__(self, object_id: str) -> np.ndarray:
        """The object's points.

        Raises:
            DataError: when the file is missing or broken.
        """
        if object_id not in self.files:
            raise DataError(f"{self.folder} has no cloud of object {object_id}; complete the folder")
        try:
            return np.load(self.files[object_id], allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.files[object_id]} is broken ({error}); copy it again") from error
