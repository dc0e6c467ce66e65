"""Which columns of a cloud's file are positions and colours, and what range the colours are in.

Names decide where there are names, and the kind of number that the file declares; else the values do. What cannot be told
is not guessed: it is left out and said, or refused where the file itself says that it is a colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pointalign.data.files.thinning import Thinner
from pointalign.errors import DataError

XYZ, RGB = ("x", "y", "z"), ("red", "green", "blue")
SPLAT = ("f_dc_0", "f_dc_1", "f_dc_2")
OTHER_NAMES = {
    **dict.fromkeys(["px", "pos_x", "x_coord", "x_coordinate"], "x"),
    **dict.fromkeys(["py", "pos_y", "y_coord", "y_coordinate"], "y"),
    **dict.fromkeys(["pz", "pos_z", "z_coord", "z_coordinate"], "z"),
    **dict.fromkeys(["r", "rf", "color_r", "colour_r"], "red"),
    **dict.fromkeys(["g", "gf", "color_g", "colour_g"], "green"),
    **dict.fromkeys(["b", "bf", "color_b", "colour_b"], "blue"),
    **dict.fromkeys(["i", "gray", "grey", "reflectance", "reflectivity"], "intensity"),
}
USED_NAMES = {*XYZ, *RGB, *SPLAT, "intensity"}
PREFIXES = ("//", "#", "%", "scalar_", "diffuse_", "vertex_")
# The zeroth spherical harmonic. Source: Kerbl et al. 2023, "3D Gaussian Splatting" (arXiv 2308.04079), section 4: colour
# is 0.5 plus this times the coefficient.
ZEROTH_HARMONIC = 0.28209479177387814
# How far from 1 the length of a normal may be that was written with three or more digits.
NORMAL_TOLERANCE = 2e-3
NORMAL_SHARE = 0.99
# A column of labels seldom reaches this, a colour channel of 0-255 mostly does.
COLOR_CHANNEL_HIGH = 100


class Column(NamedTuple):
    """One column of a file: its name ("" where it has none), and the numpy kind of its numbers ("" where it is text)."""

    name: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A cloud's file, opened: what its columns are, and its rows in pieces.

    Attributes:
        columns: C of them.
        chunks: arrays (n, C) of numbers.
        notes: what the reader has to say.
    """

    columns: tuple[Column, ...]
    chunks: Iterator[np.ndarray]
    notes: tuple[str, ...] = ()


class Cloud(NamedTuple):
    """Rows told apart: xyz (N, 3) float64, rgb (N, 3) float64 in [0, 1] or None, and what to say of it."""

    xyz: np.ndarray
    rgb: np.ndarray | None
    notes: list[str]


def plain_name(name: str) -> str:
    """A column's name as this module knows it: small letters, no prefix, no unit; synonyms are one."""
    name = name.strip().strip("\"'").lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix).strip()
    name = name.split("[")[0].split("(")[0].strip()
    return OTHER_NAMES.get(name, name)


def is_used(name: str) -> bool:
    """Whether a column of that name can matter for a coloured cloud."""
    return plain_name(name) in USED_NAMES


def renamed(table: Table, names: Sequence[str], where: str) -> Table:
    """The table with its columns named by the user; "-" leaves a column out.

    Raises:
        DataError: when there are not as many names as columns.
    """
    if len(names) != len(table.columns):
        raise DataError(
            f"{where} has {len(table.columns)} columns and {len(names)} names were given; name each, '-' leaves one out"
        )
    return replace(
        table, columns=tuple(Column(name, column.kind) for name, column in zip(names, table.columns, strict=True))
    )


def read_table(table: Table, capacity: int, seed: int, where: str, color_max: float | None = None) -> Cloud:
    """Read a table's rows, thin them at random to what is kept, and tell positions and colours apart.

    Args:
        table: what a reader gives.
        capacity: how many points to keep at most.
        seed: of the random choice.
        where: what to call the file in an error.
        color_max: the value that means full colour, where the user knows better than the values tell.

    Raises:
        DataError: when positions or named colours cannot be made out, or no point is finite.
    """
    thinner = Thinner(capacity, len(table.columns), seed)
    xyz = _positions(table.columns, where)
    order = [*xyz, *(i for i in range(len(table.columns)) if i not in xyz)]
    for rows in table.chunks:
        thinner.add(rows[:, order])
    if not thinner.seen:
        raise DataError(f"{where} holds no point with finite coordinates; give a file that holds a shape")
    notes = list(table.notes)
    if thinner.dropped:
        notes.append(left_out(thinner.dropped, "point", "coordinates"))
    rows = thinner.rows()
    if len(rows) < thinner.seen:
        notes.append(f"{thinner.seen:,} points, thinned at random (seed {seed}) to {len(rows):,}")
    else:
        notes.append("1 point" if len(rows) == 1 else f"{len(rows):,} points")
    reader = _Colors([table.columns[i] for i in order], rows, thinner, where, color_max)
    rgb = reader.read()
    notes += reader.notes
    if rgb is not None and not (finite := np.isfinite(rgb).all(axis=1)).all():
        notes.append(left_out(int((~finite).sum()), "point", "colours"))
        rows, rgb = rows[finite], rgb[finite]
        if not len(rows):
            raise DataError(f"{where} holds no finite colour; leave its colour columns out")
    return Cloud(rows[:, :3], rgb, notes)


def left_out(count: int, what: str, why: str) -> str:
    """A note that says so: 2 points with colours that are not finite were left out."""
    things, were = (what, "was") if count == 1 else (f"{what}s", "were")
    return f"{count:,} {things} with {why} that are not finite {were} left out"


def _positions(columns: Sequence[Column], where: str) -> list[int]:
    """Indices of x, y, z."""
    names = [plain_name(column.name) for column in columns]
    if not any(names):
        if len(columns) < 3:
            raise DataError(f"{where} has {len(columns)} columns; a cloud has at least x, y, z")
        return [0, 1, 2]
    if not set(XYZ) <= set(names):
        told = ", ".join(repr(column.name[:20]) for column in columns[:8])
        raise DataError(f"{where} has columns {told} and not x, y, z among them; say which is which with `columns`")
    return [names.index(axis) for axis in XYZ]


class _Colors:
    """Finds the colours in rows whose first three columns are x, y, z."""

    def __init__(
        self, columns: list[Column], rows: np.ndarray, thinner: Thinner, where: str, color_max: float | None
    ) -> None:
        self.columns, self.rows, self.where, self.color_max = columns, rows, where, color_max
        self.low, self.high = thinner.low, thinner.high
        self.names = [plain_name(column.name) for column in columns]
        self.notes: list[str] = []

    def read(self) -> np.ndarray | None:
        """(N, 3) in [0, 1], or None."""
        if set(RGB) <= set(self.names):
            rgb = self._scaled([self.names.index(channel) for channel in RGB])
            if rgb is not None or "intensity" not in self.names:
                return rgb
        elif set(SPLAT) <= set(self.names):
            self.notes.append("a Gaussian splat: its centres, coloured by the zeroth spherical harmonic")
            return (0.5 + ZEROTH_HARMONIC * self._values(SPLAT)).clip(0, 1)
        if "intensity" in self.names:
            return self._gray(self.names.index("intensity"))
        if any(self.names):
            self.notes.append("no colour columns")
            return None
        start = self._find_unnamed()
        if start is None:
            return None
        self.notes.append(f"columns {start + 1}-{start + 3} taken as red, green, blue")
        return self._scaled([start, start + 1, start + 2])

    def _values(self, names: Sequence[str]) -> np.ndarray:
        return self.rows[:, [self.names.index(name) for name in names]]

    def _gray(self, index: int) -> np.ndarray | None:
        low, high = min(self.low[index], 0.0), self.high[index]
        if not high > low:
            self.notes.append("intensity is zero everywhere: taken as no colour")
            return None
        self.notes.append(f"gray from intensity, {high:g} as white")
        return np.repeat((self.rows[:, [index]] - low) / (high - low), 3, axis=1)

    def _find_unnamed(self) -> int | None:
        """Where three columns without names start that can be colours."""
        count = len(self.columns)
        if count < 6:
            unused = {3: "no colour columns", 4: "column 4 has no name and was not used"}
            self.notes.append(unused.get(count, f"columns 4-{count} have no names and were not used"))
            return None
        starts = (3, 4) if count == 7 else (3, 6)
        for start in (start for start in starts if start + 3 <= count):
            told = f"columns {start + 1}-{start + 3}"
            if _are_normals(self.rows[:, start : start + 3]):
                self.notes.append(f"{told} are unit normals and were not taken for colours")
            elif self._full([start, start + 1, start + 2]) is None:
                low, high = self.low[start : start + 3].min(), self.high[start : start + 3].max()
                self.notes.append(f"{told} hold {low:g} to {high:g}, neither colours nor normals, and were not used")
            else:
                self._refuse_ambiguous(start)
                return start
        return None

    def _refuse_ambiguous(self, start: int) -> None:
        """Seven columns of 0-255 are rgb and one more as likely as one more and rgb."""
        if start != 3 or len(self.columns) != 7 or self.high[6] < COLOR_CHANNEL_HIGH:
            return
        if self._full([4, 5, 6]) == 255 and len(np.unique(self.rows[:, 6])) > 1:
            raise DataError(
                f"{self.where} has seven columns without names: rgb may be columns 4-6 or 5-7; name them with `columns`, "
                "for instance x,y,z,intensity,red,green,blue"
            )

    def _full(self, indices: list[int]) -> float | None:
        """The value that means full colour, or None where these are no colours."""
        low, high = self.low[indices].min(), self.high[indices].max()
        if self.color_max is not None:
            return self.color_max if low >= 0 and high <= self.color_max else None
        kinds = {self.columns[i].kind for i in indices}
        if not low >= 0:
            return None
        if kinds == {"u1"}:
            return 255
        whole = bool((np.mod(self.rows[:, indices], 1) == 0).all())
        if high <= 1:
            return 1
        if high < 2 and not whole:
            return None
        if high <= 255:
            return 255
        return 65535 if high <= 65535 and whole else None

    def _scaled(self, indices: list[int]) -> np.ndarray | None:
        low, high, full = self.low[indices].min(), self.high[indices].max(), self._full(indices)
        if full is None:
            expected = f"0 to {self.color_max:g}" if self.color_max is not None else "0-1, 0-255 or whole 0-65535"
            raise DataError(
                f"{self.where} has colours from {low:g} to {high:g}, not {expected}; rescale them, or name the columns "
                "otherwise with `columns`"
            )
        if high == 0:
            self.notes.append("colours are zero everywhere: taken as no colour")
            return None
        kinds = {self.columns[i].kind for i in indices}
        if full == 1 and set(np.unique(self.rows[:, indices])) <= {0.0, 1.0} and self.color_max is None:
            self.notes.append("colours are all 0 or 1: taken as 0-1")
        elif full == 255 and kinds == {"u2"}:
            self.notes.append(f"16-bit colours up to {high:g}: taken as 0-255")
        else:
            self.notes.append(f"colours 0-{full:g}")
        return self.rows[:, indices] / full


def _are_normals(triple: np.ndarray) -> bool:
    """Whether (N, 3) values are vectors of length 1, here and there one of length 0."""
    length = np.linalg.norm(triple, axis=1)
    real = length > NORMAL_TOLERANCE
    return bool(real.mean() > 0.5 and (np.abs(length[real] - 1) < NORMAL_TOLERANCE).mean() >= NORMAL_SHARE)
