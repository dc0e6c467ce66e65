"""Cache of what the frozen half computes: once per object, on disk, read without loading a cloud again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pointalign.errors import DataError
from pointalign.storage import written_file

SHARD_SIZE = 256


def weights_fingerprint(modules: Sequence[nn.Module]) -> str:
    """Hash of all weights and buffers, by name, shape and value."""
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{number} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Tensors per object, kept in memory-mapped safetensors shards that are written whole or not at all.

    The folder's name is a hash of everything that the tensors depend on, so a stale cache cannot be read. A process that
    is killed loses at most the shard it was computing; processes that fill the same cache share its shards among them.

    Args:
        root: folder of all caches.
        object_ids: the objects, in a fixed order.
        depends_on: whatever determines the tensors (fingerprints of weights, clouds and preprocessing).
    """

    def __init__(self, root: Path, object_ids: Sequence[str], depends_on: dict[str, Any]) -> None:
        self.object_ids = list(object_ids)
        self._row = {object_id: row for row, object_id in enumerate(self.object_ids)}
        key = repr(sorted(depends_on.items())) + "\n" + "\n".join(self.object_ids)
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._open: dict[int, dict[str, Tensor]] = {}
        self._checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files anew."""
        return {**self.__dict__, "_open": {}}

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._row

    @property
    def num_shards(self) -> int:
        """Number of files the cache has when full."""
        return -(-len(self.object_ids) // SHARD_SIZE)

    @property
    def is_full(self) -> bool:
        """Whether nothing is left to compute."""
        return all(self._path(shard).is_file() for shard in range(self.num_shards))

    def _path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def fill(
        self, compute: Callable[[list[str]], dict[str, Tensor]], batch_size: int, progress: Callable[[int], None]
    ) -> None:
        """Compute what is missing, if the disk has room for it, each shard in one process.

        A shard that another process is computing is left to it; should that process end before it is done, this one does it.

        Args:
            compute: from a list of object ids to tensors with one row per object.
            batch_size: objects per call of `compute`.
            progress: called with the number of objects done since the last call.

        Raises:
            DataError: when the disk has too little room, is full or cannot be written.
        """
        shards = range(self.num_shards)
        missing = sum(len(self._members(shard)) for shard in shards if not self._path(shard).is_file())

        def tensors(members: list[str]) -> dict[str, Tensor]:
            rows: list[dict[str, Tensor]] = []
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                rows.append({name: tensor.cpu() for name, tensor in compute(batch).items()})
                if not self._checked:
                    self._check_room(sum(tensor[0].nbytes for tensor in rows[0].values()), missing)
                    self._checked = True
                progress(len(batch))
            return {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}

        left = [shard for shard in shards if not self._fill_shard(shard, tensors, progress, wait=False)]
        for shard in left:
            self._fill_shard(shard, tensors, progress, wait=True)

    def _fill_shard(
        self,
        shard: int,
        tensors: Callable[[list[str]], dict[str, Tensor]],
        progress: Callable[[int], None],
        wait: bool,
    ) -> bool:
        """Have one shard on disk; False when another process is computing it and is not waited for."""
        path, members = self._path(shard), self._members(shard)
        if path.is_file():
            progress(len(members))
            return True
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), timeout=-1 if wait else 0)
            try:
                lock.acquire()
            except Timeout:
                return False
        try:
            if path.is_file():
                progress(len(members))
                return True
            for half in self.folder.glob(f".*-{path.name}"):  # of a process that was killed: the lock was its
                half.unlink(missing_ok=True)
            content = tensors(members)
            with self._writing(), written_file(path) as temporary:
                save_file(content, temporary)
        finally:
            # Whoever holds a lock file that is no longer there finds the shard, or does its work a second time.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        return True

    def _members(self, shard: int) -> list[str]:
        return self.object_ids[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]

    def _check_room(self, object_bytes: int, count: int) -> None:
        disk = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(disk).free
        if object_bytes * count > free:
            raise DataError(
                f"the feature cache of {count:,} objects needs {object_bytes * count / 2**30:,.1f} GiB ({object_bytes:,} bytes "
                f"each), but {free / 2**30:,.1f} GiB are free in {disk}: set POINTALIGN_CACHE to a folder on a larger disk, or "
                "train with --no-cache-features (in a recipe `cache_features: false`)"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot write the feature cache {self.folder}: {error}; free some space or set POINTALIGN_CACHE"
            ) from error

    def __getitem__(self, object_id: str) -> dict[str, Tensor]:
        """The object's tensors, without the batch dimension.

        Raises:
            DataError: when the object is not in the cache or its shard is broken.
        """
        if object_id not in self._row:
            raise DataError(f"object {object_id} is not in the feature cache; fill it with this object")
        shard, row = divmod(self._row[object_id], SHARD_SIZE)
        if shard not in self._open:
            try:
                opened = safe_open(self._path(shard), framework="pt")
                self._open[shard] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self._path(shard)} is broken ({error}); delete it and run again") from error
        # The shard's tensors are views of the mapped file; a row of one would carry all of it into another process.
        return {name: tensor[row].clone() for name, tensor in self._open[shard].items()}
