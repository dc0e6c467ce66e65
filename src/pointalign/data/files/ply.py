""".ply files: clouds in pieces, meshes whole; ascii and both binary byte orders.

A reader of our own, because points by the ten million must not be held, faces of mixed size are common, and what a header
announces must be there before anything is set aside for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from pointalign.data.files.columns import Column, Table, is_used
from pointalign.data.files.numbers import read_numbers
from pointalign.data.files.source import (
    CHUNK_ROWS,
    MAX_FACES,
    MAX_MESH_BYTES,
    MAX_POINTS,
    MAX_TEXT_MESH_BYTES,
    MAX_VERTICES,
    Source,
)
from pointalign.errors import DataError

MAX_HEADER_LINES = 2000
MAX_HEADER_LINE = 4096
# Rows of different length are found one by one, about a million a second.
MAX_RAGGED_ROWS = 20_000_000
TYPES = {
    **dict.fromkeys(["char", "int8"], "i1"),
    **dict.fromkeys(["uchar", "uint8"], "u1"),
    **dict.fromkeys(["short", "int16"], "i2"),
    **dict.fromkeys(["ushort", "uint16"], "u2"),
    **dict.fromkeys(["int", "int32"], "i4"),
    **dict.fromkeys(["uint", "uint32"], "u4"),
    **dict.fromkeys(["float", "float32"], "f4"),
    **dict.fromkeys(["double", "float64"], "f8"),
}
LIST_COUNT_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4")


@dataclass
class Property:
    """One property of an element; `count` is the type of a list's length, None for a single number."""

    name: str
    type: str
    count: str | None = None


@dataclass
class Element:
    """A kind of thing that the file holds `count` times."""

    name: str
    count: int
    properties: list[Property] = field(default_factory=list)

    @property
    def has_lists(self) -> bool:
        """Whether its rows differ in length."""
        return any(prop.count for prop in self.properties)

    def dtype(self, order: str) -> np.dtype:
        """A row as numpy sees it, for an element without lists."""
        return np.dtype([(prop.name, order + prop.type) for prop in self.properties])


@dataclass
class Header:
    """What stands before the data: encoding ("ascii", "<" or ">"), elements in order, texture files from comments."""

    encoding: str
    elements: list[Element]
    textures: list[str]

    def element(self, name: str) -> Element | None:
        """The element of that name, if it has any rows."""
        return next((element for element in self.elements if element.name == name and element.count), None)


@dataclass
class Lists:
    """A list property of all rows: row i holds flat[starts[i] : starts[i] + counts[i]]."""

    counts: np.ndarray
    starts: np.ndarray
    flat: np.ndarray


Rows = dict[str, "np.ndarray | Lists"]


def read_header(source: Source) -> Header:
    """Read the header; the file then stands at its data.

    Raises:
        DataError: when it is not a .ply header, or announces more than the file can hold or than is read.
    """
    lines = _header_lines(source)
    if next(lines, "") != "ply":
        raise DataError(f"{source.name} does not begin with 'ply'; it is of another format")
    encoding, elements, textures = "", [], []
    for line in lines:
        words = line.split()
        match words:
            case ["format", kind, *_]:
                encoding = {"ascii": "ascii", "binary_little_endian": "<", "binary_big_endian": ">"}.get(kind, "")
            case ["comment", word, *_] if word.lower() == "texturefile":
                textures.append(line.split(None, 2)[2])
            case ["element", name, count]:
                elements.append(Element(name, int(count)))
            case ["property", "list", count, kind, name] if elements and TYPES.get(count) in LIST_COUNT_TYPES:
                elements[-1].properties.append(Property(name, TYPES[kind], TYPES[count]))
            case ["property", kind, name] if elements and kind in TYPES:
                elements[-1].properties.append(Property(name, TYPES[kind]))
            case ["comment" | "obj_info", *_] | []:
                continue
            case _:
                raise DataError(
                    f"{source.name} has a header line that is not understood: {line[:60]!r}; export it again"
                )
    if not encoding:
        raise DataError(f"{source.name} does not say whether it is ascii or binary; export it again")
    header = Header(encoding, elements, textures)
    _check_announced(source, header)
    return header


def _header_lines(source: Source) -> Iterator[str]:
    for _ in range(MAX_HEADER_LINES):
        line = source.file.readline(MAX_HEADER_LINE)
        if not line.endswith(b"\n"):
            break
        text = line.decode("utf-8", errors="replace").strip()
        if text == "end_header":
            return
        yield text
    raise DataError(f"{source.name} has no end of its header; the file is broken or cut short")


def _check_announced(source: Source, header: Header) -> None:
    left = source.size - source.file.tell()
    for element in header.elements:
        if len({prop.name for prop in element.properties}) != len(element.properties):
            raise DataError(f"{source.name} names a property of its {element.name} twice; export it again")
        sizes = [np.dtype(prop.count or prop.type).itemsize for prop in element.properties]
        smallest = 2 * len(sizes) - 1 if header.encoding == "ascii" else sum(sizes)
        if element.count < 0 or element.count > MAX_POINTS:
            raise DataError(f"{source.name} announces {element.count} of {element.name}; at most {MAX_POINTS} are read")
        if element.count * max(smallest, 1) > left + 1:
            raise DataError(
                f"{source.name} announces {element.count} of {element.name}, more than fit into its {source.size} bytes; "
                "the file is cut short"
            )
        left -= element.count * max(smallest, 1)


def is_mesh(header: Header) -> bool:
    """Whether the header announces faces."""
    return header.element("face") is not None or header.element("tristrips") is not None


def read_ply_cloud(source: Source, header: Header, every: bool = False) -> Table:
    """The vertices of a .ply without faces, in pieces.

    Args:
        source: the file.
        header: what it announces.
        every: give all properties, not those alone whose names are known.

    Raises:
        DataError: when there are none, or they stand behind or hold lists.
    """
    vertex = header.element("vertex")
    if vertex is None:
        raise DataError(f"{source.name} holds no vertices; give a file that holds a shape")
    before = header.elements[: header.elements.index(vertex)]
    if vertex.has_lists or any(element.has_lists and element.count for element in before):
        raise DataError(f"{source.name} has lists in or before its vertices; export it with plain vertices first")
    used = [prop for prop in vertex.properties if every or is_used(prop.name)] or vertex.properties
    columns = tuple(Column(prop.name, prop.type) for prop in used)
    kept = [vertex.properties.index(prop) for prop in used]
    if header.encoding == "ascii":
        for _ in islice(_data_lines(source), sum(element.count for element in before)):
            pass
        rows = read_numbers(source, len(vertex.properties), kept, count=vertex.count)
        return Table(columns, rows, ("ascii PLY without faces",))
    for element in before:
        source.file.seek(element.count * element.dtype(header.encoding).itemsize, 1)
    names = [prop.name for prop in used]
    rows = _binary_rows(source, vertex.dtype(header.encoding), vertex.count, names)
    return Table(columns, rows, ("binary PLY without faces",))


def _binary_rows(source: Source, dtype: np.dtype, count: int, names: list[str]) -> Iterator[np.ndarray]:
    for start in range(0, count, CHUNK_ROWS):
        rows = np.frombuffer(source.read_exactly(min(CHUNK_ROWS, count - start) * dtype.itemsize), dtype)
        block = np.empty((len(rows), len(names)))
        for column, name in enumerate(names):
            block[:, column] = rows[name]
        yield block


def _data_lines(source: Source) -> Iterator[bytes]:
    """Lines that hold something."""
    return (line for line in source.lines() if not line.isspace())


def read_elements(source: Source, header: Header, wanted: set[str]) -> dict[str, Rows]:
    """Rows of the wanted elements, whole: single numbers as (count,) arrays, lists as `Lists`.

    Raises:
        DataError: when the file is too large to be held or shorter than announced.
    """
    ascii = header.encoding == "ascii"
    source.check_size(MAX_TEXT_MESH_BYTES if ascii else MAX_MESH_BYTES, "decimate the mesh or save its points alone")
    for name, limit in (("vertex", MAX_VERTICES), ("face", MAX_FACES)):
        element = header.element(name)
        if element is not None and element.count > limit:
            raise DataError(f"{source.name} has {element.count:,} of {name}, more than {limit:,}; decimate the mesh")
    found: dict[str, Rows] = {}
    lines = _data_lines(source) if ascii else iter(())
    for element in header.elements:
        if wanted <= found.keys():
            break
        found[element.name] = (
            _ascii_element(source, element, lines) if ascii else _binary_element(source, element, header)
        )
    return found


def _ascii_element(source: Source, element: Element, lines: Iterator[bytes]) -> Rows:
    """All numbers of the element in one flat array, then cut at the lists' lengths."""
    flat, starts = array("d"), np.empty(element.count, dtype=np.int64)
    for row in range(element.count):
        line = next(lines, None)
        if line is None:
            raise DataError(f"{source.name} ends after {row} of {element.count} {element.name}; the file is cut short")
        starts[row] = len(flat)
        flat.extend(map(float, line.split()))
    numbers = np.frombuffer(flat, dtype=np.float64)
    ends = np.append(starts[1:], len(numbers))
    rows: Rows = {}
    for prop in element.properties:
        if len(starts) and starts.max() >= len(numbers):
            raise DataError(f"{source.name} has a row of {element.name} with too few numbers; the file is broken")
        if prop.count is None:
            values, starts = numbers[starts], starts + 1
            is_byte = prop.type == "u1" and ((values >= 0) & (values <= 255)).all()
            rows[prop.name] = values.astype(np.uint8) if is_byte else values
            continue
        counts = numbers[starts].astype(np.int64)
        rows[prop.name] = Lists(counts, starts + 1, numbers)
        starts = starts + 1 + counts
    if element.properties and (starts != ends).any():
        raise DataError(f"{source.name} has a row of {element.name} with too few or too many numbers; it is broken")
    return rows


def _binary_element(source: Source, element: Element, header: Header) -> Rows:
    if not element.has_lists:
        dtype = element.dtype(header.encoding)
        table = np.frombuffer(source.read_exactly(element.count * dtype.itemsize), dtype)
        return {prop.name: table[prop.name] for prop in element.properties}
    start = source.file.tell()
    equal = _binary_equal_lists(source, element, header.encoding)
    if equal is not None:
        return equal
    source.file.seek(start)
    return _binary_ragged_lists(source, element, header.encoding)


def _binary_equal_lists(source: Source, element: Element, order: str) -> Rows | None:
    """Rows whose lists are all as long as the first row's, which is nearly every mesh; None when they are not."""
    start, fields = source.file.tell(), []
    for prop in element.properties:
        if prop.count is None:
            fields.append((prop.name, order + prop.type))
            continue
        source.file.seek(start + np.dtype(fields).itemsize)
        kind = np.dtype(order + prop.count)
        length = int(np.frombuffer(source.read_exactly(kind.itemsize), kind)[0])
        if not 0 <= length <= source.size:
            return None
        fields += [(f"count of {prop.name}", kind), (prop.name, order + prop.type, (length,))]
    dtype = np.dtype(fields)
    source.file.seek(start)
    if element.count * dtype.itemsize > source.size - start:
        return None
    table = np.frombuffer(source.read_exactly(element.count * dtype.itemsize), dtype)
    rows: Rows = {}
    for prop in element.properties:
        if prop.count is None:
            rows[prop.name] = table[prop.name]
            continue
        counts = table[f"count of {prop.name}"]
        length = int(counts[0])
        if (counts != length).any():
            return None
        starts = np.arange(element.count, dtype=np.int64) * length
        rows[prop.name] = Lists(np.full(element.count, length, dtype=np.int64), starts, table[prop.name].reshape(-1))
    return rows


def _binary_ragged_lists(source: Source, element: Element, order: str) -> Rows:
    """Rows of different length: found one after the other, then gathered at once."""
    if element.count > MAX_RAGGED_ROWS:
        raise DataError(
            f"{source.name} has {element.count:,} {element.name} of different length, more than the "
            f"{MAX_RAGGED_ROWS:,} read of those; triangulate the mesh"
        )
    data = source.file.read()
    sizes = [(np.dtype(order + (prop.count or prop.type)), np.dtype(prop.type).itemsize) for prop in element.properties]
    places = np.empty((len(sizes), element.count), dtype=np.int64)
    byte_order = "little" if order == "<" else "big"
    at = 0
    for row in range(element.count):
        for column, (kind, item) in enumerate(sizes):
            places[column, row] = at
            if element.properties[column].count:
                length = int.from_bytes(data[at : at + kind.itemsize], byte_order, signed=kind.kind == "i")
                at += item * max(length, 0)
            at += kind.itemsize
        if at > len(data):
            raise DataError(f"{source.name} ends after {row} of {element.count} {element.name}; the file is cut short")
    source.file.seek(at - len(data), 1)
    octets = np.frombuffer(data, dtype=np.uint8)
    rows: Rows = {}
    for prop, (kind, item), place in zip(element.properties, sizes, places, strict=True):
        numbers = _gather(octets, place, kind)
        if prop.count is None:
            rows[prop.name] = numbers
            continue
        counts = numbers.astype(np.int64).clip(min=0)
        starts = np.cumsum(counts) - counts
        inside = np.arange(counts.sum()) - np.repeat(starts, counts)
        first = np.repeat(place + kind.itemsize, counts) + inside * item
        rows[prop.name] = Lists(counts, starts, _gather(octets, first, np.dtype(order + prop.type)))
    return rows


def _gather(octets: np.ndarray, places: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Numbers that begin at the given places of a run of bytes, in pieces to spare memory."""
    numbers, steps = np.empty(len(places), dtype=kind), np.arange(kind.itemsize)
    for start in range(0, len(places), CHUNK_ROWS):
        piece = places[start : start + CHUNK_ROWS]
        numbers[start : start + len(piece)] = octets[piece[:, None] + steps].view(kind)[:, 0]
    return numbers
