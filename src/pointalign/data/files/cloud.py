"""A point cloud as it comes out of a file: points, colours, and what was done to get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pointalign.errors import DataError


def turned_up(xyz: np.ndarray) -> np.ndarray:
    """(N, 3) points whose z is up, turned so that y is."""
    return np.stack([xyz[:, 0], xyz[:, 2], -xyz[:, 1]], axis=1)


@dataclass(frozen=True)
class PointCloud:
    """A cloud that was read from a file.

    Attributes:
        points: (N, 3) float32 xyz in the file's units, y up; not centred and not scaled, which is the processor's work.
        colors: (N, 3) float32 sRGB in [0, 1], or None where the file has no colour.
        source: the file.
        notes: what was found and done, one short sentence each, for people.
        unit: of xyz in metres; None where it is not known.
    """

    points: np.ndarray
    colors: np.ndarray | None
    source: str
    notes: tuple[str, ...] = ()
    unit: float | None = None

    def __len__(self) -> int:
        return len(self.points)

    def filled(self, missing_color: Sequence[float]) -> PointCloud:
        """The same cloud with a colour where it has none, and a note that says so.

        Args:
            missing_color: rgb in [0, 1]; what stands for none in the model's data, `processor.missing_color`.

        Raises:
            DataError: when missing_color is not three numbers in [0, 1].
        """
        if self.colors is not None:
            return self
        color = np.asarray(missing_color, dtype=np.float32)
        if color.shape != (3,) or not ((color >= 0) & (color <= 1)).all():
            raise DataError(f"a missing colour is three numbers between 0 and 1; {missing_color} is not")
        told = ", ".join(f"{value:g}" for value in color)
        note = f"no colour: filled with ({told}), as in the model's own data"
        return replace(self, colors=np.tile(color, (len(self), 1)), notes=(*self.notes, note))

    def array(self, missing_color: Sequence[float] | None = None) -> np.ndarray:
        """The cloud as one array, as the processor takes it.

        Args:
            missing_color: rgb in [0, 1] for a cloud without colour. When None such a cloud stays without, and the
                processor fills in its own.

        Returns:
            (N, 6) float32 xyz and rgb, or (N, 3) xyz where there is no colour.
        """
        cloud = self if missing_color is None else self.filled(missing_color)
        if cloud.colors is None:
            return cloud.points.copy()
        return np.concatenate([cloud.points, cloud.colors], axis=1)

    def sized_array(self, missing_color: Sequence[float]) -> np.ndarray:
        """(N, 7) float32: xyz, rgb as in `array`, and the unit of xyz in metres in every row, 0 where it is not known."""
        unit = np.full((len(self), 1), self.unit or 0, dtype=np.float32)
        return np.concatenate([self.array(missing_color), unit], axis=1)
