"""What is read: an open 3D file of a known format, how much of it may be read, and how its failures are told."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pointalign.errors import DataError, PointAlignError
from pointalign.progress import progress

MEBIBYTE = 2**20
# Clouds are read in pieces, so that their size costs time and not memory.
MAX_CLOUD_BYTES = 16 * 2**30
MAX_POINTS = 500_000_000
CHUNK_ROWS = 2**18
# Meshes are held whole: what is binary or text takes two to three times its size in memory, XML up to sixteen times.
MAX_MESH_BYTES = 2 * 2**30
MAX_TEXT_MESH_BYTES = 512 * MEBIBYTE
MAX_XML_BYTES = 256 * MEBIBYTE
MAX_FACES = 100_000_000
MAX_VERTICES = 150_000_000
MAX_PARTS = 50_000
MAX_LINE_BYTES = MEBIBYTE
# What a compressed file may become.
MAX_UNPACKED_BYTES = 4 * 2**30

CLOUD_FORMATS = ("ply", "pcd", "las", "laz", "npy", "npz", "xyz", "txt", "csv", "pts", "asc")
MESH_FORMATS = ("ply", "obj", "stl", "off", "glb", "gltf", "3mf", "dae")
FORMATS = tuple(dict.fromkeys([*CLOUD_FORMATS, *MESH_FORMATS]))
SNIFFED_BYTES = 4096
# Smaller files are read at once.
SHOWN_MEBIBYTES = 64
SECONDS_UNSHOWN = 5.0
LONGEST_REASON = 160
# What lies under the name of a 3D file and is none, by its first bytes in small letters; and what to do about it.
STAND_INS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype html": "is a web page, not a 3D file; download the file itself",
    b"<html": "is a web page, not a 3D file; download the file itself",
    **dict.fromkeys(
        (b"\x1f\x8b\x08", b"bzh91ay&sy", b"\xfd7zxz\0", b"7z\xbc\xaf\x27\x1c"), "is packed; unpack it first"
    ),
}


@dataclass(frozen=True)
class Source:
    """An open 3D file.

    Attributes:
        file: the bytes, seekable, at their start.
        name: what to call it in an error.
        format: one of FORMATS.
        size: how many bytes it has.
        path: where it lies; None for standard input, beside which nothing lies.
    """

    file: BinaryIO
    name: str
    format: str
    size: int
    path: Path | None = None

    def check_size(self, limit: int, remedy: str) -> None:
        """Refuse a file of more than `limit` bytes.

        Raises:
            DataError: with the remedy as its last words.
        """
        if self.size > limit:
            raise DataError(
                f"{self.name} has {readable(self.size)}, more than the {readable(limit)} that are read of such a "
                f".{self.format}; {remedy}"
            )

    def read_exactly(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            DataError: when fewer are left; nothing is set aside for bytes that are not there.
        """
        left = self.size - self.file.tell()
        data = self.file.read(count) if 0 <= count <= left else b""
        if len(data) != count:
            raise DataError(f"{self.name} ends too early: {count} bytes are announced and {left} left; copy it again")
        return data

    def lines(self) -> Iterator[bytes]:
        """The rest of the file line by line.

        Raises:
            DataError: when a line is longer than MAX_LINE_BYTES.
        """
        while line := self.file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{self.name} has a line of a mebibyte; it is not the text that its format promises")
            yield line


@contextmanager
def open_source(path: str | Path, format: str | None = None) -> Iterator[Source]:
    """Open a 3D file, or standard input for "-".

    Args:
        path: the file.
        format: one of FORMATS, with or without a dot; by default the file's ending, and its first bytes where it has
            none that is known.

    Raises:
        DataError: when there is no such file, it may not be read, is empty or too large, or its format cannot be told.
    """
    name = printable(str(path))
    if name.lower().startswith(("http://", "https://", "ftp://", "file://")):
        raise DataError(f"no address is fetched: {name}; download the file and give its path")
    if name == "-":
        if sys.stdin is None:
            raise DataError("standard input is closed; give a file, or pipe one in")
        with tempfile.TemporaryFile() as copy:
            _copy_bounded(sys.stdin.buffer, copy)
            yield _source(copy, "standard input", format, None)
        return
    with _opened(Path(path), name) as file:
        yield _source(file, name, format, Path(path))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file, one that takes long so that it tells how far it has been read."""
    try:
        if path.is_dir():
            raise DataError(f"{name} is a folder; give one 3D file")
        if not path.is_file():
            if path.exists():
                raise DataError(f"{name} is no ordinary file; pipe it into `-`")
            raise DataError(f"no 3D file at {name}; check the path")
        raw = ShownFile(path, "rb")
    except OSError as error:
        raise DataError(f"cannot open {name}: {error.strerror}; check the path and who may read it") from error
    with io.BufferedReader(raw, MEBIBYTE) as file:
        mebibytes = file.seek(0, 2) // MEBIBYTE
        if mebibytes < SHOWN_MEBIBYTES:
            yield file
            return
        with progress(f"reading {printable(path.name)} (MiB)", mebibytes, patience=SECONDS_UNSHOWN) as raw.advance:
            yield file


class ShownFile(io.FileIO):
    """A file that tells `advance` how many mebibytes more of it have been reached."""

    advance: Callable[[int], None] | None = None
    _reached = 0

    def readinto(self, buffer: Any, /) -> int | None:
        """Read as any file does."""
        count = super().readinto(buffer)
        place = self.tell() // MEBIBYTE
        if self.advance is not None and place > self._reached:
            self.advance(place - self._reached)
            self._reached = place
        return count


def _source(file: Any, name: str, format: str | None, path: Path | None) -> Source:
    size = file.seek(0, 2)
    file.seek(0)
    if size == 0:
        raise DataError(f"{name} is empty; give a file that holds a shape")
    if size > MAX_CLOUD_BYTES:
        raise DataError(f"{name} has {readable(size)}, more than the {readable(MAX_CLOUD_BYTES)} read; thin it first")
    given = (format or (path.suffix if path else "")).lower().lstrip(".")
    if format is not None and given not in FORMATS:
        raise DataError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    head = file.read(SNIFFED_BYTES)
    file.seek(0)
    for mark, told in STAND_INS.items():
        if head.lower().startswith(mark):
            raise DataError(f"{name} {told}")
    if given not in FORMATS:
        found = sniff(head, size)
        if found is None:
            raise DataError(f"cannot tell the format of {name}; give one of {', '.join(FORMATS)}")
        given = found
    return Source(file, name, given, size, path)


def _copy_bounded(stream: BinaryIO, copy: Any) -> None:
    left = MAX_CLOUD_BYTES + 1
    while left > 0 and (piece := stream.read(min(left, MEBIBYTE))):
        left -= len(piece)
        copy.write(piece)


def sniff(head: bytes, size: int) -> str | None:
    """The format that a file's first bytes speak of; None when they speak of none.

    Args:
        head: the first bytes, SNIFFED_BYTES of them where there are so many.
        size: of the whole file in bytes; it tells a binary STL, which has no mark of its own.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = text[:SNIFFED_BYTES].lower()
    marks = {b"ply": "ply", b"gltf": "glb", b"\x93numpy": "npy", b"lasf": "laz", b"off": "off", b"coff": "off"}
    for mark, format in marks.items():
        if lower.startswith(mark):
            return format
    if head.startswith(b"PK\x03\x04"):
        return "3mf" if b"3D/" in head or b"[Content_Types].xml" in head else "npz"
    if len(head) >= 84 and size == 84 + 50 * int.from_bytes(head[80:84], "little"):
        return "stl"
    if lower.startswith((b"# .pcd", b"version")) and b"fields" in lower:
        return "pcd"
    if lower.startswith(b"solid") and b"facet" in lower:
        return "stl"
    if lower.startswith((b"<?xml", b"<collada")) and b"<collada" in lower:
        return "dae"
    if lower.startswith(b"{") and b'"asset"' in lower:
        return "gltf"
    lines = [line.split() for line in lower.splitlines()]
    if any(line[:1] in ([b"v"], [b"mtllib"]) and len(line) > 1 for line in lines):
        return "obj"
    return "txt" if _is_number_table(lines) else None


def _is_number_table(lines: list[list[bytes]]) -> bool:
    """Whether a line of at least three numbers comes before the first bytes run out."""
    for line in lines[:-1] or lines:
        words = b" ".join(line).replace(b",", b" ").replace(b";", b" ").split()
        try:
            if len([float(word) for word in words]) >= 3:
                return True
        except ValueError:
            continue
    return False


@contextmanager
def failures_told(name: str) -> Iterator[None]:
    """Turn whatever a reader trips over in a foreign file into one line.

    Raises:
        DataError: in place of every error that is not one of ours.
    """
    try:
        yield
    except PointAlignError as error:
        if str(error).isprintable():
            raise
        raise type(error)(printable(str(error))) from error
    except MemoryError as error:
        raise DataError(f"{name} needs more memory than there is; make it smaller or read it elsewhere") from error
    except Exception as error:
        raise DataError(f"cannot read {name}: {reason(error)}; the file is broken or cut short") from error


def reason(error: BaseException) -> str:
    """The first line of an error without what a terminal would obey, or its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    text = printable(lines[0]) if lines else type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def printable(text: str) -> str:
    """The same text with "?" for whatever a terminal would obey or could not show: names in files come from strangers."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def readable(size: int) -> str:
    """A number of bytes for people: 1.5 GiB."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if value == int(value) else f"{value:.1f} {units[0]}"
