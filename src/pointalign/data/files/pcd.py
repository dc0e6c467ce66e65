""".pcd files (Point Cloud Library): ascii, binary and binary_compressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pointalign.data.files.columns import RGB, Column, Table, is_used
from pointalign.data.files.numbers import read_numbers
from pointalign.data.files.source import CHUNK_ROWS, MAX_POINTS, MEBIBYTE, Source, readable
from pointalign.errors import DataError

MAX_HEADER_LINES = 100
MAX_HEADER_LINE = 4096
# The decoder is in Python, some tens of megabytes a second, and its columns lie one behind the other.
MAX_COMPRESSED_BYTES = 512 * MEBIBYTE
KINDS = {"F": "f", "I": "i", "U": "u"}
PACKED = ("rgb", "rgba")


class _Field(NamedTuple):
    name: str
    kind: str
    count: int


class _Layout(NamedTuple):
    fields: list[_Field]
    points: int
    data: str

    def dtype(self) -> np.dtype:
        """A row; fields that are not used, and those of several numbers, are bytes."""
        sizes = [np.dtype(field.kind).itemsize * field.count for field in self.fields]
        kinds = [field.kind if field.count == 1 else f"V{size}" for field, size in zip(self.fields, sizes, strict=True)]
        return np.dtype([(f"{number}", kind) for number, kind in enumerate(kinds)])


def read_pcd(source: Source, every: bool = False) -> Table:
    """Open a .pcd; colours packed into `rgb` or `rgba` are unpacked.

    Args:
        source: the file.
        every: give all fields of one number, not those alone whose names are known.

    Raises:
        DataError: when its header is not understood, or it is shorter than that says.

    Source: the PCD file format, version 0.7 (Point Cloud Library).
    """
    layout = _read_header(source)
    used = [
        number
        for number, f in enumerate(layout.fields)
        if f.count == 1 and (every or is_used(f.name) or f.name in PACKED)
    ]
    columns: list[Column] = []
    for number in used:
        name, kind, _ = layout.fields[number]
        columns += [Column(channel, "u1") for channel in RGB] if name in PACKED else [Column(name, kind)]
    if not columns:
        raise DataError(f"{source.name} has no x, y, z among its fields; export it again")
    readers = {"ascii": _ascii_rows, "binary": _binary_rows, "binary_compressed": _compressed_rows}
    return Table(tuple(columns), readers[layout.data](source, layout, used), (f"{layout.data} PCD",))


def _read_header(source: Source) -> _Layout:
    said: dict[str, list[str]] = {}
    for _ in range(MAX_HEADER_LINES):
        line = source.file.readline(MAX_HEADER_LINE)
        if not line.endswith(b"\n"):
            break
        words = line.decode("latin-1").split("#")[0].split()
        if words:
            said[words[0].upper()] = words[1:]
        if words[:1] in (["DATA"], ["data"]):
            return _layout(source, said)
    raise DataError(f"{source.name} has no DATA line; it is no .pcd, or cut short")


def _layout(source: Source, said: dict[str, list[str]]) -> _Layout:
    names = said.get("FIELDS", said.get("COLUMNS", []))
    sizes, types = said.get("SIZE", []), said.get("TYPE", [])
    counts = said.get("COUNT", ["1"] * len(names))
    if not names or not len(names) == len(sizes) == len(types) == len(counts):
        raise DataError(f"{source.name} describes its fields with lines of different length; export it again")
    fields = [
        _Field(name.lower(), f"<{KINDS[kind]}{int(size)}", int(count))
        for name, kind, size, count in zip(names, types, sizes, counts, strict=True)
    ]
    points = int(said["POINTS"][0]) if "POINTS" in said else int(said["WIDTH"][0]) * int(said["HEIGHT"][0])
    data = said["DATA"][0].lower()
    if data not in ("ascii", "binary", "binary_compressed") or any(not 0 < field.count <= 4096 for field in fields):
        raise DataError(
            f"{source.name} has data {data[:20]!r} or field counts that are not understood; export it again"
        )
    layout = _Layout(fields, points, data)
    left = source.size - source.file.tell()
    row = layout.dtype().itemsize if data == "binary" else 2 * len(fields) - 1 if data == "ascii" else 0
    if not 0 <= points <= MAX_POINTS or points * row > left + 1:
        raise DataError(
            f"{source.name} announces {points} points, more than it holds or than are read; it is cut short"
        )
    return layout


def _ascii_rows(source: Source, layout: _Layout, used: list[int]) -> Iterator[np.ndarray]:
    places = np.cumsum([0, *(field.count for field in layout.fields)])
    kept = [int(places[number]) for number in used]
    for numbers in read_numbers(source, int(places[-1]), kept, count=layout.points):
        columns = {f"{number}": _typed(numbers[:, at], layout.fields[number]) for at, number in enumerate(used)}
        yield _block(columns, layout, used, len(numbers))


def _typed(numbers: np.ndarray, field: _Field) -> np.ndarray:
    """A packed colour written as a number: a float that can be no value is its bits, as PCL once wrote it; a whole number
    below zero is one without a sign."""
    if field.name not in PACKED:
        return numbers
    bits = numbers.astype("<f4").view("<u4")
    whole = (np.nan_to_num(numbers).clip(-(2**31), 2**32 - 1).astype("<i8") & 0xFFFFFFFF).astype("<u4")
    return np.where((numbers >= 1) & (numbers < 2**32), whole, bits) if field.kind[1] == "f" else whole


def _binary_rows(source: Source, layout: _Layout, used: list[int]) -> Iterator[np.ndarray]:
    dtype = layout.dtype()
    for start in range(0, layout.points, CHUNK_ROWS):
        count = min(CHUNK_ROWS, layout.points - start)
        rows = np.frombuffer(source.read_exactly(count * dtype.itemsize), dtype)
        yield _block({f"{number}": rows[f"{number}"] for number in used}, layout, used, count)


def _compressed_rows(source: Source, layout: _Layout, used: list[int]) -> Iterator[np.ndarray]:
    packed, size = np.frombuffer(source.read_exactly(8), "<u4").tolist()
    dtype = layout.dtype()
    if size != dtype.itemsize * layout.points:
        raise DataError(f"{source.name} unpacks to {size} bytes, not to its {layout.points} points; it is broken")
    if size > MAX_COMPRESSED_BYTES:
        raise DataError(
            f"{source.name} unpacks to {readable(size)}, more than the {readable(MAX_COMPRESSED_BYTES)} read of those; "
            "save it as binary, not compressed"
        )
    data = decompress_lzf(source.read_exactly(packed), size, source.name)
    columns, at = {}, 0
    for number, field in enumerate(layout.fields):
        kind = dtype[f"{number}"]
        if number in used:
            columns[f"{number}"] = np.frombuffer(data, kind, layout.points, at)
        at += np.dtype(field.kind).itemsize * field.count * layout.points
    yield _block(columns, layout, used, layout.points)


def _block(columns: dict[str, np.ndarray], layout: _Layout, used: list[int], count: int) -> np.ndarray:
    """Rows (n, C) of the used fields, packed colours as three columns."""
    parts: list[np.ndarray] = []
    for number in used:
        values = columns[f"{number}"]
        if layout.fields[number].name in PACKED:
            if values.dtype.itemsize != 4:
                raise DataError(f"packed colours have 4 bytes, not {values.dtype.itemsize}; export the cloud again")
            bits = np.ascontiguousarray(values).view("<u4")
            parts += [(bits >> shift) & 255 for shift in (16, 8, 0)]
        else:
            parts.append(values)
    return (
        np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1) if count else np.empty((0, len(parts)))
    )


def decompress_lzf(data: bytes, size: int, where: str) -> bytes:
    """Undo LZF, the compression of binary_compressed files.

    A control byte below 32 announces that many bytes and one more as they are; any other a repetition of what came
    before: its high three bits are the length less two (7: one byte more says how much longer), its low five bits and the
    next byte the distance less one.

    Args:
        data: the compressed bytes.
        size: of what they come to.
        where: what to call the file in an error.

    Raises:
        DataError: when they come to more or less, or repeat what was not there.

    Source: LibLZF's format, by Marc Lehmann.
    """
    out, at, end = bytearray(), 0, len(data)
    try:
        while at < end:
            control = data[at]
            at += 1
            if control < 32:
                out += data[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            start = len(out) - ((control & 31) << 8) - data[at] - 1
            at += 1
            if start < 0 or len(out) > size:
                break
            piece = out[start : start + length + 2]
            repeats = -(-(length + 2) // len(piece))
            out += (piece * repeats)[: length + 2] if repeats > 1 else piece
    except IndexError:
        pass  # the length tells
    if len(out) != size:
        raise DataError(f"{where} unpacks to {len(out)} bytes instead of {size}; the file is broken")
    return bytes(out)
