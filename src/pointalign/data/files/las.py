""".las and .laz files (airborne and terrestrial laser scans), read in pieces."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pointalign.data.files import unlaz
from pointalign.data.files.columns import RGB, XYZ, Column, Table
from pointalign.data.files.source import CHUNK_ROWS, MAX_POINTS, MEBIBYTE, Source
from pointalign.errors import DataError, MissingDependencyError

MAGIC = b"LASF"
HEADER_BYTES = 375
# Where the colours stand in a record, by its format. Source: ASPRS LAS specification 1.4 R15, tables 7 to 17.
COLOR_OFFSETS = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}
RECORD_BYTES = {0: 20, 1: 28, 2: 26, 3: 34, 4: 57, 5: 63, 6: 30, 7: 36, 8: 38, 9: 59, 10: 67}
INTENSITY_OFFSET = 12
LASZIP_RECORD = (b"laszip encoded", 22204)
MAX_VLRS = 10_000
# What the decompressor sets aside for one compressed chunk follows from numbers in the file.
MAX_LAZ_CHUNK_BYTES = 512 * MEBIBYTE


class _Header(NamedTuple):
    format: int
    record: int
    count: int
    start: int
    scale: np.ndarray
    offset: np.ndarray
    compressed: bool
    laszip: bytes


def read_las(source: Source) -> Table:
    """Open a .las or .laz of any point format; colours where the format has them, else gray from intensity.

    Raises:
        DataError: when it is broken, cut short, or of an unknown point format.
        MissingDependencyError: when it is compressed and lazrs is not installed.

    Source: ASPRS LAS specification 1.4 R15.
    """
    header = _read_header(source)
    colored = header.format in COLOR_OFFSETS
    columns = [*(Column(axis, "f8") for axis in XYZ), Column("intensity", "u2")]
    columns += [Column(channel, "u2") for channel in RGB] if colored else []
    records = _laz_records(source, header) if header.compressed else _las_records(source, header)
    kind = "LAZ" if header.compressed else "LAS"
    rows = (_rows(record, header) for record in records)
    return Table(tuple(columns), rows, (f"{kind}, point format {header.format}",))


def _read_header(source: Source) -> _Header:
    head = source.read_exactly(min(source.size, HEADER_BYTES))
    if head[:4] != MAGIC or len(head) < 227:
        raise DataError(f"{source.name} is no .las; it is of another format or cut short")
    minor = head[25]
    header_size, start, num_vlrs = struct.unpack_from("<HII", head, 94)
    kind, record, count = struct.unpack_from("<BHI", head, 104)
    if minor >= 4 and len(head) >= 255:
        count = struct.unpack_from("<Q", head, 247)[0] or count
    numbers = np.frombuffer(head, "<f8", 6, 131)
    compressed, kind = kind >= 128, kind & 63
    if kind not in RECORD_BYTES or record < RECORD_BYTES[kind]:
        raise DataError(f"{source.name} has points of format {kind} in {record} bytes, which is not known")
    if not np.isfinite(numbers).all():
        raise DataError(f"{source.name} has a scale or an offset that is not finite; the file is broken")
    if count > MAX_POINTS or (not compressed and start + count * record > source.size) or start > source.size:
        raise DataError(f"{source.name} announces {count} points, more than it holds or than are read; it is cut short")
    laszip = _laszip_record(source, header_size, num_vlrs) if compressed else b""
    return _Header(kind, record, count, start, numbers[:3], numbers[3:], compressed, laszip)


def _laszip_record(source: Source, header_size: int, num_vlrs: int) -> bytes:
    """The variable-length record that tells how the points are compressed."""
    source.file.seek(header_size)
    for _ in range(min(num_vlrs, MAX_VLRS)):
        _, user, number, length = struct.unpack("<H16sHH", source.read_exactly(54)[:22])
        body = source.read_exactly(length)
        if (user.rstrip(b"\0"), number) == LASZIP_RECORD:
            return body
    raise DataError(f"{source.name} does not say how its points are compressed; the file is broken")


def _las_records(source: Source, header: _Header) -> Iterator[np.ndarray]:
    """Records as bytes (n, record)."""
    source.file.seek(header.start)
    for done in range(0, header.count, CHUNK_ROWS):
        count = min(CHUNK_ROWS, header.count - done)
        data = source.read_exactly(count * header.record)
        yield np.frombuffer(data, np.uint8).reshape(count, header.record)


def _laz_records(source: Source, header: _Header) -> Iterator[np.ndarray]:
    """Records as bytes (n, record), unpacked by a process of their own."""
    if importlib.util.find_spec("lazrs") is None:
        raise MissingDependencyError("reading .laz needs lazrs: pip install lazrs")
    _check_laszip(source, header)
    source.file.seek(0)
    # The decompressor ends its whole process when a broken file makes it ask for more memory than there is.
    command = [sys.executable, "-P", unlaz.__file__, *map(str, header[1:4]), header.laszip.hex()]
    quiet = {**os.environ, "RUST_BACKTRACE": "0"}
    with subprocess.Popen(
        command, stdin=source.file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for done in range(0, header.count, CHUNK_ROWS):
                count = min(CHUNK_ROWS, header.count - done)
                data = process.stdout.read(count * header.record)
                if len(data) < count * header.record:
                    told = process.stderr.read().decode("utf-8", errors="replace").strip().splitlines()[:1]
                    raise DataError(f"cannot unpack {source.name}: {(told or ['no data'])[0][:120]}; it is broken")
                yield np.frombuffer(data, np.uint8).reshape(count, header.record)
        finally:
            process.kill()


def _check_laszip(source: Source, header: _Header) -> None:
    """What the decompressor would believe: its items must make up one record, its chunks a bounded size."""
    if len(header.laszip) < 34:
        raise DataError(f"{source.name} has a compression record of {len(header.laszip)} bytes; the file is broken")
    (chunk,) = struct.unpack_from("<I", header.laszip, 12)
    (items,) = struct.unpack_from("<H", header.laszip, 32)
    sizes = [size for _, size, _ in struct.iter_unpack("<HHH", header.laszip[34 : 34 + 6 * items])]
    if len(sizes) != items or sum(sizes) != header.record:
        raise DataError(f"{source.name} compresses {sum(sizes)} bytes a point and has {header.record}; it is broken")
    if chunk != 2**32 - 1 and chunk * header.record > MAX_LAZ_CHUNK_BYTES:
        raise DataError(f"{source.name} is compressed {chunk:,} points at a time; compress it with a usual chunk size")


def _rows(records: np.ndarray, header: _Header) -> np.ndarray:
    """(n, 4 or 7) float64: xyz, intensity, and red, green, blue where the format has them."""
    whole = np.ascontiguousarray(records[:, :12]).view("<i4")
    columns = [whole * header.scale + header.offset]
    starts = [INTENSITY_OFFSET]
    if header.format in COLOR_OFFSETS:
        starts += [COLOR_OFFSETS[header.format] + 2 * channel for channel in range(3)]
    columns += [np.ascontiguousarray(records[:, start : start + 2]).view("<u2") for start in starts]
    return np.concatenate(columns, axis=1)
