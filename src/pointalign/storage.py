"""How files come to be on disk: whole or not at all; and where what can be computed again is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError

from pointalign.errors import CheckpointError, DataError


def cache_dir() -> Path:
    """Where converted models and computed features are kept: $POINTALIGN_CACHE, else the user's cache folder."""
    if explicit := os.environ.get("POINTALIGN_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointalign"


@contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """A temporary path beside the target that takes its place when the block ends well, and vanishes when it does not.

    The folder is made where it is missing; the temporary name ends as the target does. An OSError that names no file, as
    on a full disk, is made to name the target.

    Raises:
        DataError: when the target is a folder, or no name at all.
    """
    if not target.name or target.is_dir():
        raise DataError(f"cannot write {str(target)!r}: it is a folder; name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def written_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary folder that takes the target's place when the block ends well, and vanishes when it does not.

    Args:
        target: the folder to write; of a link the folder that it leads to.
        replace: whether it takes the place of a folder that is there; else that one, which another process has written
            meanwhile, stays.

    Raises:
        CheckpointError: when the folder cannot be written; an existing target is then left as it was.
    """
    try:
        place = Path(os.path.realpath(target))  # where links go round in circles, making its folder says so
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}; choose a folder that can be written"
        ) from error
    try:
        yield temporary
        _open_to_others(temporary)
        _move(temporary, place, replace)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(target: Path) -> None:
    """Remove what a process that was killed left of `written_folder`; no other may be writing the target."""
    for path in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def writable(text: str) -> str:
    """A text with a question mark for half a character, which models and JSON can hold, and files and requests cannot."""
    return text.encode("utf-8", "replace").decode()


def lie_in_each_other(one: Path, other: Path) -> bool:
    """Whether writing one of two folders anew would take the other, or a part of it."""
    first, second = one.resolve(), other.resolve()
    return first.is_relative_to(second) or second.is_relative_to(first)


def _move(folder: Path, target: Path, replace: bool) -> None:
    if replace and target.exists():
        old = folder.with_name(folder.name + "-old")
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
        return
    try:
        folder.rename(target)
    except OSError:
        if replace or not target.is_dir():
            raise


def _open_to_others(folder: Path) -> None:
    """Give a folder and all in it the rights that new files have; temporary folders and safetensors' files are private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def lock_of(path: Path) -> FileLock:
    """The lock, not taken yet, on what one process at a time works at.

    It lies in the cache, so that nothing stays beside the work: processes with other cache folders do not see it.

    Raises:
        DataError: when the cache cannot be written.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    lock = FileLock(cache_dir() / "locks" / f"{name}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()
    except OSError as error:
        raise DataError(f"cannot write {lock.lock_file}: {error.strerror}; set POINTALIGN_CACHE") from error
    return lock


def taken_lock(path: Path) -> AcquireReturnProxy:
    """The lock on a file that this process writes, taken; free again where its `with` block ends, or `.lock` is released.

    Raises:
        DataError: when another process holds it, or the cache cannot be written.
    """
    lock = lock_of(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"another process is writing {path}; wait for it, or name another --out") from error
