"""Clouds saved by numpy: .npy and .npz, read in pieces; nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.lib import format as numpy_format

from pointalign.data.files.columns import RGB, XYZ, Column, Table, is_used
from pointalign.data.files.source import CHUNK_ROWS, MAX_UNPACKED_BYTES, Source, readable
from pointalign.data.files.zips import open_zip
from pointalign.errors import DataError

POINT_NAMES = ("points", "xyz", "point_cloud", "cloud", "pc", "pcd", "pos", "positions", "coords", "coord", "vertices")
COLOR_NAMES = ("colors", "color", "rgb", "rgbs", "colours", "colour")
MAX_MEMBERS = 10_000


class _Array:
    """An array in a stream, of which only the header has been read.

    Attributes:
        columns: what its rows hold.
        count: how many rows.
    """

    def __init__(self, file: BinaryIO, size: int, where: str, every: bool = False) -> None:
        self.file, self.where, self.every = file, where, every
        version = numpy_format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{where} is of .npy version {version[0]}.{version[1]}; save it again with plain columns")
        read_header = numpy_format.read_array_header_1_0 if version == (1, 0) else numpy_format.read_array_header_2_0
        self.shape, self.fortran, self.dtype = read_header(file)
        if self.dtype.hasobject:
            raise DataError(f"{where} holds Python objects, which are never unpickled; save numbers")
        self.fields: list[str] = []
        self.columns, self.count = self._layout()
        announced = math.prod(self.shape) * self.dtype.itemsize
        if announced > size:
            raise DataError(f"{where} ends too early: {announced} bytes are announced, it has {size}; copy it again")

    def _layout(self) -> tuple[list[Column], int]:
        names = self.dtype.names
        if names is not None and len(self.shape) == 1:
            used = [name for name in names if self.every or is_used(name)]
            if any(self.dtype[name].shape or self.dtype[name].kind not in "fiu" for name in used):
                raise DataError(f"{self.where} has fields that are no single numbers; save plain columns")
            self.fields = used or list(names)
            return [Column(name, self.dtype[name].str[1:]) for name in self.fields], self.shape[0]
        if names is not None or self.dtype.kind not in "fiu":
            raise DataError(f"{self.where} holds {self.dtype}, not numbers; save floats or integers")
        if len(self.shape) != 2 or not 3 <= self.shape[1] <= 256:
            turned = len(self.shape) == 2 and 3 <= self.shape[0] <= 16
            hint = "transpose it" if turned else "save one cloud, one point a row"
            raise DataError(f"{self.where} has shape {self.shape}, not (points, 3 or more); {hint}")
        return [Column("", self.dtype.str[1:])] * self.shape[1], self.shape[0]

    def chunks(self) -> Iterator[np.ndarray]:
        """Rows (n, C) in pieces; an array in Fortran order is read whole, for its rows lie scattered."""
        width = 1 if self.fields else self.shape[1]
        if self.fortran:
            if (size := math.prod(self.shape) * self.dtype.itemsize) > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"{self.where} has {readable(size)} in Fortran order, more than the {readable(MAX_UNPACKED_BYTES)} "
                    "read of those; save it in C order"
                )
            whole = self._read(self.count * width).reshape(self.shape, order="F")
            for start in range(0, self.count, CHUNK_ROWS):
                yield whole[start : start + CHUNK_ROWS]
            return
        for start in range(0, self.count, CHUNK_ROWS):
            rows = self._read(min(CHUNK_ROWS, self.count - start) * width)
            if self.fields:
                yield np.stack([rows[name].astype(np.float64) for name in self.fields], axis=1)
            else:
                yield rows.reshape(-1, width)

    def _read(self, count: int) -> np.ndarray:
        data = self.file.read(count * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            raise DataError(f"{self.where} ends too early; copy it again")
        return np.frombuffer(data, dtype=self.dtype)


def read_npy(source: Source, every: bool = False) -> Table:
    """Open a cloud in a .npy file: (N, 3 or more) numbers, or a structured array with named fields.

    Args:
        source: the file.
        every: give all named fields, not those alone whose names are known.

    Raises:
        DataError: for Python objects, other shapes, or a file that is shorter than its header says.
    """
    array = _Array(source.file, source.size, source.name, every)
    return Table(tuple(array.columns), array.chunks())


def read_npz(source: Source) -> Table:
    """Open a cloud in a .npz file.

    Taken are the array with one of POINT_NAMES, or the only one that can be a cloud, and beside it one with one of
    COLOR_NAMES and as many rows.

    Raises:
        DataError: when no array or more than one can be the cloud, or it would unpack to more than MAX_UNPACKED_BYTES.
    """
    archive = open_zip(source)
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()[:MAX_MEMBERS]}
    arrays, problems = {}, []
    for name, info in members.items():
        where = f"{name} in {source.name}"
        if info.file_size > MAX_UNPACKED_BYTES:
            raise DataError(f"{where} unpacks to {readable(info.file_size)}; {readable(MAX_UNPACKED_BYTES)} are read")
        if info.filename.endswith(".npy"):
            try:
                arrays[name] = _Array(archive.open(info), info.file_size, where)  # pyright: ignore[reportArgumentType]
            except DataError as error:
                problems.append(error)
    name = _choose(arrays, POINT_NAMES)
    if name is None:
        if len(problems) == 1 and not arrays:
            raise problems[0]
        told = ", ".join(list(members)[:8]) or "nothing"
        raise DataError(f"cannot tell which array of {source.name} is the cloud (it holds {told}); call it 'points'")
    cloud = arrays.pop(name)
    same = {key: array for key, array in arrays.items() if key.lower() in COLOR_NAMES and array.count == cloud.count}
    color = _choose(same, COLOR_NAMES) if len(cloud.columns) == 3 else None
    if color is None:
        return Table(tuple(cloud.columns), cloud.chunks(), (f"array {name!r}",))
    shown = arrays[color]
    kinds = [column.kind for column in (*cloud.columns, *shown.columns[:3])]
    columns = [Column(name, kind) for name, kind in zip((*XYZ, *RGB), kinds, strict=True)]
    return Table(tuple(columns), _side_by_side(cloud, shown), (f"arrays {name!r} and {color!r}",))


def _choose(arrays: dict[str, _Array], names: Sequence[str]) -> str | None:
    by_name = {name.lower(): name for name in arrays}
    for name in names:
        if name in by_name:
            return by_name[name]
    return next(iter(arrays)) if len(arrays) == 1 else None


def _side_by_side(cloud: _Array, colors: _Array) -> Iterator[np.ndarray]:
    for rows, shown in zip(cloud.chunks(), colors.chunks(), strict=True):
        yield np.concatenate([rows.astype(np.float64), shown[:, :3].astype(np.float64)], axis=1)
