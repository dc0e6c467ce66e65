"""Names for the colours of a point cloud, found in a perceptual space against a kept list.

A rule on red, green and blue calls most real objects gray: shading and dull paint lower every channel's contrast, and a
green cypress comes out gray too. In OKLab a dull green lies nearer to green anchors than to gray ones.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

COLOR_NAMES_FILE = Path(__file__).parent.parent / "assets" / "color_names.csv"
MIN_SHARE = 0.12
MAX_COLORS = 3
# Names follow hue and chroma more than lightness, which light and shade change.
LIGHTNESS_WEIGHT = 0.7


@dataclass(frozen=True)
class NamedColor:
    """A colour of an object: its name, the basic colour it is a shade of, and the share of points that have it."""

    name: str
    base: str
    share: float


def srgb_to_oklab(rgb: np.ndarray) -> np.ndarray:
    """Colours (..., 3) from sRGB in [0, 1] to OKLab: lightness, green-red, blue-yellow.

    Source: Ottosson 2020, "A perceptual color space for image processing"; the transfer curve is IEC 61966-2-1.
    """
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(lms) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def name_colors(rgb: np.ndarray) -> list[tuple[str, str]]:
    """The name and basic colour of each colour (N, 3), sRGB in [0, 1]."""
    names, _ = _anchors()
    return [names[i] for i in _nearest(np.reshape(rgb, (-1, 3)))]


def color_indices(rgb: np.ndarray) -> np.ndarray:
    """Where each colour's name stands in the kept list, (N,), to be counted by `count_colors`.

    Args:
        rgb: (N, 3) sRGB in [0, 1], rounded to 8 bits here.
    """
    packed = np.round(np.asarray(rgb) * 255).astype(np.int64) @ np.array([65536, 256, 1])
    values, places = np.unique(packed, return_inverse=True)
    return _nearest(np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1) / 255)[places]


def count_colors(indices: np.ndarray) -> list[NamedColor]:
    """The colours that most points have, largest share first.

    Shades of one basic colour count together and go by the name that most of their points have. The first colour is
    always given, others when at least MIN_SHARE of the points have them, at most MAX_COLORS in all.

    Args:
        indices: (N,) as `color_indices` gives them, of a cloud or a part of it, N >= 1.
    """
    names, _ = _anchors()
    by_base: dict[str, Counter[str]] = {}
    for index, count in enumerate(np.bincount(indices).tolist()):
        if count:
            name, base = names[index]
            by_base.setdefault(base, Counter())[name] += count
    found = [
        NamedColor(min(shades, key=lambda name: (-shades[name], name)), base, sum(shades.values()) / len(indices))
        for base, shades in by_base.items()
    ]
    found.sort(key=lambda color: (-color.share, color.base))
    return found[:1] + [color for color in found[1:MAX_COLORS] if color.share >= MIN_SHARE]


def dominant_colors(rgb: np.ndarray) -> list[NamedColor]:
    """The colours that most of a cloud has, see `count_colors`.

    Args:
        rgb: (N, 3) sRGB in [0, 1], N >= 1.
    """
    return count_colors(color_indices(rgb))


def _nearest(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(_anchors()[1].query(_weighted(rgb))[1])


@cache
def _anchors() -> tuple[list[tuple[str, str]], KDTree]:
    """Names of the kept list, and its colours as a tree to search."""
    with COLOR_NAMES_FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rgb = np.array([[int(row["hex"][k : k + 2], 16) for k in (1, 3, 5)] for row in rows]) / 255
    return [(row["name"], row["base"]) for row in rows], KDTree(_weighted(rgb))


def _weighted(rgb: np.ndarray) -> np.ndarray:
    return srgb_to_oklab(rgb) * np.array([LIGHTNESS_WEIGHT, 1.0, 1.0])
